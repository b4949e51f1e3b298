"""What `alpro preflight` looks at: each module measures one thing on every rank and judges what all of them found."""
