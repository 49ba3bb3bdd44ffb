"""What corpora and finished runs are like: numbers, tables and pictures. Trains nothing."""
