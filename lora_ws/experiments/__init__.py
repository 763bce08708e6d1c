"""Tables, figures and experiments of `eval/`, one folder per `kind:`, all of one shape.

``spec.py`` is what the YAML file holds, ``run.py`` measures what has not been measured,
``report.py`` turns records into sections of the report.
"""
