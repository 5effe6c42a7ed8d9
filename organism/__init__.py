"""The embedded model organism: its world, its weights and the script that remakes them."""
