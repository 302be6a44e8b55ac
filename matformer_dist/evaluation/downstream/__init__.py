"""lm-eval's tasks at any submodel of one loaded model."""
