"""`python -m weftrain.cli`."""

from weftrain.cli.launcher import end_with_launcher

end_with_launcher()  # before anything is imported that takes its time

from weftrain.cli.main import main  # noqa: E402

main()
