"""The parts of the rl stage around the trainer in `training/grpo.py`: what is sampled, paid, learned, measured and watched."""
