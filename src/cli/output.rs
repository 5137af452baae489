//! What commands print: the answer on stdout, colours only where somebody sees them, files that are there whole or not.

use crate::client::Answer;
use anyhow::Context;
use rustix::event::{PollFd, PollFlags, poll};
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

/// A colour of text, as a terminal's escape code.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "named after what they look like")]
pub enum Colour {
    Dim = 2,
    Red = 31,
    Green = 32,
    Yellow = 33,
    Cyan = 36,
}

/// stdout.
#[derive(Debug)]
pub struct Output {
    /// Somebody looks at it.
    pub is_terminal: bool,
    has_colour: bool,
    out: BufWriter<std::io::Stdout>,
}

impl Output {
    /// Colours need a terminal and no `NO_COLOR` (no-color.org).
    #[must_use]
    pub fn new() -> Self {
        let is_terminal = std::io::stdout().is_terminal();
        let has_colour = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { is_terminal, has_colour, out: BufWriter::new(std::io::stdout()) }
    }

    /// For text that goes elsewhere: no colours, nothing shortened.
    #[must_use]
    pub fn plain() -> Self {
        Self { is_terminal: false, has_colour: false, ..Self::new() }
    }

    /// The text in a colour, where there are colours.
    #[must_use]
    pub fn paint(&self, colour: Colour, text: &str) -> String {
        if self.has_colour { format!("\x1b[{}m{text}\x1b[0m", colour as u8) } else { text.to_owned() }
    }

    /// A line.
    pub fn line(&mut self, text: &str) -> std::io::Result<()> {
        self.out.write_all(text.as_bytes())?;
        self.out.write_all(b"\n")
    }

    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.out.write_all(bytes)
    }

    /// An answer as it came, and a line end.
    pub fn answer(&mut self, answer: &Answer) -> std::io::Result<()> {
        self.bytes(&answer.body)?;
        self.bytes(b"\n")?;
        self.flush()
    }

    /// Hands on what was printed. Without it nothing may come out.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

impl Default for Output {
    fn default() -> Self {
        Self::new()
    }
}

/// Ends when whoever read stdout is gone: a pipe or socket says so to who asks for nothing else (poll(2)). Never for a file.
pub async fn reader_gone() {
    // A thread of its own: a regular file, which is never gone, cannot be waited for by epoll.
    let waiting = tokio::task::spawn_blocking(|| {
        let stdout = std::io::stdout();
        let mut wanted = [PollFd::new(&stdout, PollFlags::empty())];
        while !matches!(poll(&mut wanted, None), Ok(1..)) {}
    });
    waiting.await.ok();
}

/// Compact JSON with line breaks and indents. Works on the text: numbers stay as they were sent.
#[must_use]
pub fn pretty(text: &str) -> String {
    let mut out = String::with_capacity(text.len() * 2);
    let (mut depth, mut is_string, mut is_escaped) = (0usize, false, false);
    let mut chars = text.chars().peekable();
    let new_line = |out: &mut String, depth: usize| {
        out.push('\n');
        out.extend(std::iter::repeat_n("  ", depth));
    };
    while let Some(c) = chars.next() {
        if is_string {
            out.push(c);
            is_string = is_escaped || c != '"';
            is_escaped = !is_escaped && c == '\\';
            continue;
        }
        match c {
            '{' | '[' => {
                out.push(c);
                if matches!(chars.peek(), Some('}' | ']')) {
                    out.extend(chars.next());
                } else {
                    depth += 1;
                    new_line(&mut out, depth);
                }
            }
            '}' | ']' => {
                depth = depth.saturating_sub(1);
                new_line(&mut out, depth);
                out.push(c);
            }
            ',' => {
                out.push(c);
                new_line(&mut out, depth);
            }
            ':' => out.push_str(": "),
            _ => {
                is_string = c == '"';
                out.push(c);
            }
        }
    }
    out
}

/// A file being written beside its name: it is there whole, or not at all. Removed when dropped unfinished.
#[derive(Debug)]
pub struct Partial {
    path: PathBuf,
    beside: PathBuf,
    file: Option<BufWriter<File>>,
}

impl Partial {
    /// Refuses a name that is taken, unless `replace`.
    pub fn create(path: &Path, replace: bool) -> anyhow::Result<Self> {
        if path.exists() && !replace {
            return Err(super::usage(format!(
                "{} exists; choose another name, or --force to replace it",
                path.display()
            )));
        }
        let mut beside = path.as_os_str().to_owned();
        beside.push(".part");
        let beside = PathBuf::from(beside);
        let file = File::create(&beside).with_context(|| format!("cannot write {}", beside.display()))?;
        Ok(Self { path: path.to_owned(), beside, file: Some(BufWriter::with_capacity(1 << 20, file)) })
    }

    /// Where it is for now.
    #[must_use]
    pub fn beside(&self) -> &Path {
        &self.beside
    }

    /// Makes what was written so far readable by others, and durable.
    pub fn sync(&mut self) -> anyhow::Result<()> {
        if let Some(file) = &mut self.file {
            file.flush()?;
            file.get_ref().sync_all()?;
        }
        Ok(())
    }

    /// Gives it its name.
    pub fn finish(mut self) -> anyhow::Result<()> {
        self.sync()?;
        self.file = None;
        std::fs::rename(&self.beside, &self.path)
            .with_context(|| format!("cannot rename {} to {}", self.beside.display(), self.path.display()))?;
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(parent)?.sync_all()?;
        Ok(())
    }
}

impl Write for Partial {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.file.as_mut().map_or(Ok(0), |file| file.write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.as_mut().map_or(Ok(()), BufWriter::flush)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // After `finish` there is none.
        std::fs::remove_file(&self.beside).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pretty_json_changes_nothing_but_white_space() {
        for (text, expected) in [
            ("1.0e400", "1.0e400"),
            ("{}", "{}"),
            ("[[],{}]", "[\n  [],\n  {}\n]"),
            (r#"{"a":[1,"x,{\":\\"],"b":null}"#, "{\n  \"a\": [\n    1,\n    \"x,{\\\":\\\\\"\n  ],\n  \"b\": null\n}"),
        ] {
            assert_eq!(pretty(text), expected);
        }
    }
}
