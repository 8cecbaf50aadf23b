"""What an attacker would try: secrets that leak, and files that do more than be data. Each test fails if the attack works."""
