"""How the guide, the model in the package, is made: dialogues, tokenizer, training, evaluation."""
