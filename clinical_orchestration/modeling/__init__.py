"""Models: candidates, grouped cross-validation, evaluation, promotion and plots. Pure; knows no MLflow."""
