"""The frozen backbone, lenses, the rack, and the forward that rows of all tasks share."""
