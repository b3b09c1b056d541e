"""What the doctor examines, each part in a module: this machine, the pipeline's workers, the devices."""
