"""What a network learns from one clip: shared by training and by online learning, which is here too."""
