//! `completions`, `man`: what shells and readers of manuals need, made from the flags themselves.

use super::EXIT_CODES;
use clap::Args;
use clap_complete::Shell;
use clap_mangen::Man;
use std::io::Write;

/// Flags of `kiss-vdb completions`.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  kiss-vdb completions bash > /usr/share/bash-completion/completions/kiss-vdb
  kiss-vdb completions zsh > \"${fpath[1]}/_kiss-vdb\"
  kiss-vdb completions fish > ~/.config/fish/completions/kiss-vdb.fish")]
pub struct CompletionsArgs {
    /// bash, zsh or fish
    #[arg(value_parser = ["bash", "zsh", "fish"])]
    shell: String,
}

/// `kiss-vdb completions`
pub fn completions(args: &CompletionsArgs, mut command: clap::Command) -> anyhow::Result<()> {
    let shell = match args.shell.as_str() {
        "bash" => Shell::Bash,
        "zsh" => Shell::Zsh,
        _ => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "kiss-vdb", &mut script);
    print(&script)
}

/// `kiss-vdb man`: the program, then each verb.
pub fn man(command: clap::Command) -> anyhow::Result<()> {
    let mut page = Vec::new();
    let verbs: Vec<clap::Command> = command.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect();
    // Without the list of verbs, which would name pages of their own: each has its section here.
    let man = Man::new(command);
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    for verb in verbs {
        let name = format!("kiss-vdb {}", verb.get_name());
        writeln!(page, ".SH \"{}\"", name.to_uppercase())?;
        let man = Man::new(verb.bin_name(name));
        man.render_synopsis_section(&mut page)?;
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
        man.render_extra_section(&mut page)?;
    }
    writeln!(page, ".SH EXIT STATUS\n.nf\n{EXIT_CODES}\n.fi")?;
    print(&page)
}

fn print(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(bytes)?;
    Ok(out.flush()?)
}
