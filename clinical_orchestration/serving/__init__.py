"""The model server: every trial's champion behind HTTP on :8000, with each prediction logged to ``gold/predictions``.

:func:`clinical_orchestration.serving.app.create_app` builds it; ``python -m clinical_orchestration.serving`` runs it.
"""
