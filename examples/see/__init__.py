"""Two small models that see: pictures, questions, training and measuring. See examples/README.md."""
