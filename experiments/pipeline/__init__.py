"""An experiment becomes stages, and stages become rows."""
