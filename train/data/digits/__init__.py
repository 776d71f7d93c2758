"""scikit-learn's bundled handwritten digits as a TFDS data set that needs no network."""
