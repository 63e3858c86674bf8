"""AI feedback: models answer prompts, a judge rates the answers, and the ratings are judged."""
