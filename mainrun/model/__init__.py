"""Networks: token ids in, logits out. Strangers to data, files, clocks and trackers."""
