"""What `flashformer bench` measures, checks and reports."""
