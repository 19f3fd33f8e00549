"""Azure: which sizes fit a recipe, their quota, and jobs on Azure Machine Learning."""
