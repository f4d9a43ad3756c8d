from milora.cli import main

main()
