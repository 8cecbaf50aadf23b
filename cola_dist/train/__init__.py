"""How a method is optimised: the DeepSpeed engine, checkpoints, the loop of one worker, and its launch under Ray Train."""
