"""A command line becomes one typed, frozen experiment."""
