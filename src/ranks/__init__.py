"""One run on several devices: where each process stands, who starts and watches them, and Lightning's strategies for them."""
