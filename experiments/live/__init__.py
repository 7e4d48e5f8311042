"""Live dialogues: is what RL teaches on recorded users kept with users that react, and is it better to train so?"""
