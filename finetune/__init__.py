"""Fine-tuning of the MLLM (SFS + WFS) and calibration of the whole detector."""
