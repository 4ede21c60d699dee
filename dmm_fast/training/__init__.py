"""Training runs: of the network (`loop`) and of the proposal network (`detector`)."""
