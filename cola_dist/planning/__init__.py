"""From real actions to plans: adapters, planners, and the domains in which they are judged."""
