"""Models that others trained: reading their files safely, and writing them back as they were."""
