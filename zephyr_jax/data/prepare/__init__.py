"""Raw rows to TFDS sets (ArrayRecord), without TensorFlow."""
