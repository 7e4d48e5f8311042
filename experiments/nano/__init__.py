"""The recipe of the nano bundle: dialogues, codec, tokenizer and language model, made from nothing."""
