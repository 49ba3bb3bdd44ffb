"""Programs of this repository's own that are neither the product nor tests of it."""
