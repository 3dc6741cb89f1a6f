"""A suite on its way through the stages of one run folder."""
