import click
@click.command(short_help='x')
def watch():
    pass
