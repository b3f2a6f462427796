"""Settings: one frozen object per service, filled from layers.

    defaults  <  scaling.yaml  <  run file  <  YAML file  <  environment (KVFERRY_<FIELD>)  <  flags (--field)

A field is written once, in its settings class: its description is the flag's `--help` text and its row in
the documents' table, its type and bounds are what every layer is checked against. A wrong value raises
`SettingError` with the setting's name as the user wrote it: flag, variable or YAML key.

Secrets (`SecretStr`) have no flag, because a command line is visible to every user of the machine. KVFERRY_<FIELD>_FILE
names a file that holds one, as containers mount them.
"""
