"""tsdkd doctor: findings about a student, a teacher and prompts, before a run."""
