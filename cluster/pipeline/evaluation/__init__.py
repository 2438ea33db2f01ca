"""The evaluation: the paper's claims measured on models, beside each other, with their uncertainty."""
