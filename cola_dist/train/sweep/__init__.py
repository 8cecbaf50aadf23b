"""Many runs of one question: a space of configurations, tried out under Ray Tune, several at once, each a run of Ray Train of its own."""
