"""Section `tracking`: MLflow."""

from stackwise.config.section import Section


class TrackingParams(Section):
    """MLflow. Changes no result."""

    enabled: bool = True
    """Log every stage execution to MLflow."""
    uri: str | None = None
    """Tracking server or store; the environment variable MLFLOW_TRACKING_URI comes first (null: sqlite:///mlflow.db)."""
    experiment: str = "stackwise"
    """Name of the MLflow experiment."""
    system_metrics: bool = True
    """Log CPU, memory and GPU use while a stage runs."""
    registry: bool = True
    """Register fused and fine-tuned models as versions of models named `<experiment>-<model>`."""
