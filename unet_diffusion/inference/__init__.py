"""What a user holds: trained models, and the checkpoints that hold them."""
