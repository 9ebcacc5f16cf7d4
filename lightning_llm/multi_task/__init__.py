"""Several tasks at once: models that share a trunk, a task made of tasks, and how their losses are weighed."""
