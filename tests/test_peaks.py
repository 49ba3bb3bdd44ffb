"""Which card a name means, and what a measured peak is."""

import jax
import pytest

from mainrun.training import peaks

TERA = 1e12


def test_name_of_a_card_tells_its_peak(subtests: pytest.Subtests):
    cases = [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H200 NVL", "bfloat16", 835.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756.0),
        ("NVIDIA H100 NVL", "float16", 835.5),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312.0),
        ("NVIDIA A100 80GB PCIe", "float32", 156.0),
        ("NVIDIA A10G", "bfloat16", 70.0),
        ("NVIDIA A10", "bfloat16", 125.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("Tesla T4", "float16", 65.0),
        ("Tesla V100-SXM2-16GB", "float16", 125.0),
        ("Tesla V100-PCIE-32GB", "float32", 14.0),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", 80.0),
        ("NVIDIA RTX A6000", "float32", 77.4),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
    ]
    for name, precision, tera in cases:
        with subtests.test(name=name, precision=precision, tera=tera):
            assert peaks.of_device(name, precision) == pytest.approx(tera * TERA)


def test_a_card_that_only_sounds_like_one_has_no_known_peak(subtests: pytest.Subtests):
    cases = [
        "cpu",
        "NVIDIA A100X",
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "Quadro RTX 6000",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA GeForce RTX 3080 Ti",
        "NVIDIA RTX PRO 6000 Blackwell Workstation Edition",
    ]
    for name in cases:
        with subtests.test(name=name):
            assert peaks.of_device(name, "bfloat16") is None


def test_a_precision_that_the_card_does_not_have_has_no_peak():
    assert peaks.of_device("Tesla T4", "bfloat16") is None
    assert peaks.of_device("Tesla T4", "float32") == pytest.approx(8.1 * TERA)


def test_cards_are_no_faster_in_float32_than_in_halves():
    for card, peak in peaks._PEAKS.items():
        assert peak.float32 <= peak.float16 / 1.9, card
        assert peak.bfloat16 in (None, peak.float16), card


def test_a_measured_peak_is_that_of_a_processor_of_our_time():
    """From a tenth of one slow core's to far beyond a large server's; and not of the same product
    looked up, which would come to petaflops."""
    if jax.default_backend() != "cpu":
        pytest.skip("the bounds are a CPU's")
    assert 1e9 < peaks.measured("float32") < 1e14
