from shardforge.cli.main import main

raise SystemExit(main())
