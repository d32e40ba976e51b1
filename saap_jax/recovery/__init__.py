"""Stage 3: fine-tuning of a pruned model. Which parameters are trained is the method's; how, is here too."""
