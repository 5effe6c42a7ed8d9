"""The steps of the picture in `experiments.pipeline.pipeline`: one class for each kind of stage."""
