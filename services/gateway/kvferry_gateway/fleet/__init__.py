"""The workers as this gateway knows them, and the mail to and from them."""
