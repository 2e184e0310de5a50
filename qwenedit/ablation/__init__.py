"""Changes to the model that are switched on for an experiment and off again."""
