"""What every other folder uses: errors, atomic files, the flag parser, running a script. Imports nothing of ours."""
