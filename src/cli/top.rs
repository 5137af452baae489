//! `top`: a server at work, on a terminal: rates once a second from `/v1/metrics`, the newest events over a stream.

use super::event::{Following, text_line};
use super::output::Output;
use super::{ServerFlags, get, query, usage};
use crate::client::{Client, ServerEvent};
use anyhow::Context;
use clap::Args;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph, Row, Sparkline, Table};
use std::collections::{HashMap, VecDeque};
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

const TICK: Duration = Duration::from_secs(1);
/// Events come in bursts; a person sees no more than this.
const FRAME: Duration = Duration::from_millis(100);
/// Events and rates kept: more than the largest terminal shows.
const EVENTS_KEPT: usize = 200;
const RATES_KEPT: usize = 200;
/// Events that wait to be shown; those beyond are passed over, and counted.
const EVENTS_WAITING: usize = 1024;

/// Flags of `kiss-vdb top`.
#[derive(Args, Debug)]
#[command(
    after_help = "q ends it. Works from 80 columns and 24 lines on. With --json a line of numbers each second, for scripts.

Examples:
  kiss-vdb top
  kiss-vdb top --json --count 1"
)]
pub struct TopArgs {
    /// End after so many seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    pub(super) server: ServerFlags,
}

/// `kiss-vdb top`
pub async fn top(args: TopArgs) -> anyhow::Result<()> {
    let mut watcher = Watcher::new(&args.server).await?;
    if args.server.json {
        return lines(&mut watcher, args.count).await;
    }
    if !std::io::stdout().is_terminal() {
        return Err(usage("top needs a terminal; --json prints lines for scripts"));
    }
    let mut events = follow(&args.server, watcher.health["revision"].as_u64().unwrap_or_default()).await?;
    let mut keys = keys();
    let mut terminate = signal(SignalKind::terminate())?;
    // One look is made already; a second one at once would be a rate over no time.
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    let mut frame = tokio::time::interval(FRAME);
    frame.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut screen = Screen::open()?;
    let mut view = View { is_dirty: true, ..View::default() };
    let mut left = args.count.unwrap_or(u64::MAX);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                watcher.look().await;
                view.is_dirty = true;
                left -= 1;
                if left == 0 {
                    return Ok(());
                }
            }
            Some(event) = events.recv() => view.note(event),
            key = keys.recv() => match key {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    let is_ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                    if is_ctrl_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) {
                        return Ok(());
                    }
                }
                Some(_) => view.is_dirty = true,
                None => return Ok(()),
            },
            _ = terminate.recv() => return Ok(()),
            _ = frame.tick() => {
                if std::mem::take(&mut view.is_dirty) {
                    screen.0.draw(|frame| draw(frame, &watcher, &view))?;
                }
            }
        }
    }
}

/// The terminal while it is ours; given back however this ends. A panic gives it back too: `ratatui::init` sees to that.
struct Screen(ratatui::DefaultTerminal);

impl Screen {
    fn open() -> anyhow::Result<Self> {
        Ok(Self(ratatui::try_init().context("cannot take over the terminal")?))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Keys and changes of size, read by a thread that the end of the program ends.
fn keys() -> mpsc::Receiver<Event> {
    let (send, receive) = mpsc::channel(16);
    tokio::task::spawn_blocking(move || {
        while let Ok(event) = event::read() {
            if send.blocking_send(event).is_err() {
                return;
            }
        }
    });
    receive
}

/// The newest events; comes back by itself as `watch` does, silently: the rates show that the server is away.
///
/// Begins so far before `head` as a screen shows: one stream brings those of before and those of now, so that there is no
/// seam.
async fn follow(server: &ServerFlags, head: u64) -> anyhow::Result<mpsc::Receiver<ServerEvent>> {
    let since = head.saturating_sub(EVENTS_KEPT as u64).to_string();
    let query = query([("since", Some(since))]);
    let mut following = Following::open(server.target()?, query, |_| ()).await?;
    let (send, receive) = mpsc::channel(EVENTS_WAITING);
    tokio::spawn(async move {
        let mut is_first = true;
        while let Ok(event) = following.next().await {
            // The log does not go back so far: there is less to show, and nobody has missed anything.
            if std::mem::take(&mut is_first) && event.event == "reset" {
                continue;
            }
            if let Err(mpsc::error::TrySendError::Closed(_)) = send.try_send(event) {
                return;
            }
        }
    });
    Ok(receive)
}

/// What is on the screen beside the numbers.
#[derive(Default)]
struct View {
    /// Newest first.
    events: VecDeque<String>,
    is_dirty: bool,
}

impl View {
    fn note(&mut self, event: ServerEvent) {
        let line = text_line(&Output::plain(), &event);
        self.events.push_front(line.replace('\t', " "));
        self.events.truncate(EVENTS_KEPT);
        self.is_dirty = true;
    }
}

/// The numbers of one look.
type Samples = HashMap<String, f64>;

/// Looks once a second.
struct Watcher {
    client: Client,
    url: String,
    health: serde_json::Value,
    collections: Vec<serde_json::Value>,
    now: Samples,
    before: Samples,
    /// Seconds between the two.
    apart: f64,
    looked: Instant,
    rates: [VecDeque<u64>; RATES.len()],
    trouble: Option<String>,
}

/// What is shown a second: name, and the counters it sums.
const RATES: [(&str, &str); 4] = [
    ("requests", "kiss_http_requests_total"),
    ("revisions", "kiss_revision"),
    ("to streams", "kiss_stream_events_total"),
    ("searches", "kiss_searches_total"),
];

impl Watcher {
    async fn new(server: &ServerFlags) -> anyhow::Result<Self> {
        let target = server.target()?;
        let mut watcher = Self {
            client: Client::new(&target),
            url: target.url(),
            health: serde_json::Value::Null,
            collections: Vec::new(),
            now: Samples::new(),
            before: Samples::new(),
            apart: 1.0,
            looked: Instant::now(),
            rates: Default::default(),
            trouble: None,
        };
        watcher.try_look().await?;
        watcher.before.clone_from(&watcher.now);
        Ok(watcher)
    }

    async fn look(&mut self) {
        self.trouble = self.try_look().await.err().map(|error| format!("{error:#}"));
        for (at, rates) in self.rates.iter_mut().enumerate() {
            let rate =
                if self.trouble.is_some() { 0.0 } else { rate(&self.before, &self.now, RATES[at].1, self.apart) };
            // The cast: a rate, rounded for a bar.
            rates.push_front(rate.round() as u64);
            rates.truncate(RATES_KEPT);
        }
    }

    async fn try_look(&mut self) -> anyhow::Result<()> {
        let metrics = get(&mut self.client, "/v1/metrics").await?;
        self.health = self.client.call(hyper::Method::GET, "/v1/health", "").await?.json()?;
        let collections = get(&mut self.client, "/v1/vector").await?.json()?;
        self.collections = collections["collections"].as_array().cloned().unwrap_or_default();
        self.before = std::mem::replace(&mut self.now, samples(&String::from_utf8_lossy(&metrics.body)));
        self.apart = self.looked.elapsed().as_secs_f64().max(0.001);
        self.looked = Instant::now();
        Ok(())
    }

    fn rate(&self, at: usize) -> u64 {
        self.rates[at].front().copied().unwrap_or_default()
    }

    fn gauge(&self, name: &str) -> f64 {
        self.now.get(name).copied().unwrap_or_default()
    }

    /// Milliseconds below which a part of the last second's observations was.
    fn millis(&self, name: &str, labels: &str, part: f64) -> Option<f64> {
        quantile(&self.before, &self.now, name, labels, part).map(|seconds| seconds * 1e3)
    }

    /// Routes asked in the last second, busiest first: labels, and how often.
    fn routes(&self) -> Vec<(String, f64)> {
        let prefix = "kiss_http_request_duration_seconds_count{";
        let mut routes: Vec<(String, f64)> = self
            .now
            .iter()
            .filter_map(|(name, now)| {
                let labels = name.strip_prefix(prefix)?.strip_suffix('}')?;
                let more = now - self.before.get(name).copied().unwrap_or_default();
                (more > 0.0).then(|| (labels.to_owned(), more / self.apart))
            })
            .collect();
        routes.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        routes
    }
}

/// The lines of metrics that carry a number, by name and labels.
fn samples(text: &str) -> Samples {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.rsplit_once(' '))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .collect()
}

/// The sum over all labels, a second.
fn rate(before: &Samples, now: &Samples, name: &str, apart: f64) -> f64 {
    let sum = |samples: &Samples| -> f64 {
        let is_it = |key: &str| key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
        samples.iter().filter(|(key, _)| is_it(key)).map(|(_, value)| value).sum()
    };
    // A restart begins anew.
    ((sum(now) - sum(before)) / apart).max(0.0)
}

/// A quantile of what a histogram counted between two looks, interpolated within its bucket; `None` when that is nothing.
fn quantile(before: &Samples, now: &Samples, name: &str, labels: &str, part: f64) -> Option<f64> {
    let prefix = format!("{name}_bucket{{");
    let mut buckets: Vec<(f64, f64)> = now
        .iter()
        .filter_map(|(key, count)| {
            let inside = key.strip_prefix(&prefix)?.strip_suffix('}')?;
            let (bound, rest) = inside.strip_prefix("le=\"")?.split_once('"')?;
            if rest.trim_start_matches(',') != labels {
                return None;
            }
            let bound = if bound == "+Inf" { f64::INFINITY } else { bound.parse().ok()? };
            Some((bound, count - before.get(key).copied().unwrap_or_default()))
        })
        .collect();
    buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total = buckets.last()?.1;
    if total <= 0.0 {
        return None;
    }
    let wanted = total * part;
    let at = buckets.iter().position(|bucket| bucket.1 >= wanted)?;
    let (low, below) = if at == 0 { (0.0, 0.0) } else { buckets[at - 1] };
    let (high, upto) = buckets[at];
    if high.is_infinite() || upto <= below {
        return Some(low);
    }
    Some(low + (high - low) * (wanted - below) / (upto - below))
}

/// A line a second.
async fn lines(watcher: &mut Watcher, count: Option<u64>) -> anyhow::Result<()> {
    let mut out = Output::new();
    for _ in 0..count.unwrap_or(u64::MAX) {
        tokio::time::sleep(TICK).await;
        watcher.look().await;
        if let Some(trouble) = &watcher.trouble {
            eprintln!("kiss-vdb: {trouble}");
            continue;
        }
        let mut line = serde_json::Map::new();
        line.insert("revision".to_owned(), watcher.health["revision"].clone());
        for (at, (name, _)) in RATES.iter().enumerate() {
            line.insert(format!("{}_per_s", name.replace(' ', "_")), watcher.rate(at).into());
        }
        for (name, metric) in GAUGES {
            line.insert(name.replace(' ', "_"), watcher.gauge(metric).into());
        }
        let fsync = watcher.millis("kiss_fsync_duration_seconds", "", 0.99);
        line.insert("fsync_p99_ms".to_owned(), fsync.into());
        out.line(&serde_json::Value::Object(line).to_string())?;
        out.flush()?;
    }
    Ok(())
}

/// What is shown as it is.
const GAUGES: [(&str, &str); 8] = [
    ("keys", "kiss_keys"),
    ("vectors", "kiss_vectors"),
    ("pending", "kiss_vectors_pending"),
    ("streams", "kiss_streams"),
    ("sockets", "kiss_connections"),
    ("memory", "process_resident_memory_bytes"),
    ("log", "kiss_log_bytes"),
    ("failed", "kiss_poisoned"),
];

fn draw(frame: &mut Frame<'_>, watcher: &Watcher, view: &View) {
    let [head, upper, middle, events, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(6),
        Constraint::Length(6),
        Constraint::Min(3),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let [rates, latencies] = Layout::horizontal([Constraint::Length(34), Constraint::Min(20)]).areas(upper);
    let [numbers, collections] = Layout::horizontal([Constraint::Length(34), Constraint::Min(20)]).areas(middle);
    draw_head(frame, head, watcher);
    draw_rates(frame, rates, watcher);
    draw_latencies(frame, latencies, watcher);
    draw_numbers(frame, numbers, watcher);
    draw_collections(frame, collections, watcher);
    let lines: Vec<Line<'_>> = view.events.iter().take(events.height.into()).map(|text| event_line(text)).collect();
    frame.render_widget(Paragraph::new(lines).block(titled("newest events")), events);
    frame.render_widget(Line::from(" q quits").dim(), foot);
}

fn titled(title: &str) -> Block<'_> {
    Block::bordered().border_style(Style::new().dim()).title(format!(" {title} "))
}

fn draw_head(frame: &mut Frame<'_>, area: Rect, watcher: &Watcher) {
    let text = |name: &str| watcher.health[name].as_str().unwrap_or("?").to_owned();
    if let Some(trouble) = &watcher.trouble {
        return frame.render_widget(Line::from(format!(" kiss-vdb · {trouble}")).red(), area);
    }
    let status = match text("status") {
        ok if ok == "ok" => Span::from(ok).green(),
        other => Span::from(other).red(),
    };
    let uptime = Duration::from_secs(watcher.health["uptime_s"].as_u64().unwrap_or_default());
    let line = Line::from(vec![
        Span::from(format!(" kiss-vdb {} ", text("version"))).bold(),
        Span::from(format!(
            "{} · revision {} · up {} · {} · ",
            watcher.url,
            watcher.health["revision"],
            time(uptime),
            text("durability")
        )),
        status,
    ]);
    frame.render_widget(line, area);
}

fn time(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{}h", s / 86_400, s % 86_400 / 3600),
    }
}

fn draw_rates(frame: &mut Frame<'_>, area: Rect, watcher: &Watcher) {
    let block = titled("a second");
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let lines = Layout::vertical([Constraint::Length(1); RATES.len()]).split(inside);
    for (at, (name, _)) in RATES.iter().enumerate() {
        let [label, bar] = Layout::horizontal([Constraint::Length(20), Constraint::Min(1)]).areas(lines[at]);
        frame.render_widget(Line::from(format!("{name:<11}{:>8}", count(watcher.rate(at) as f64))), label);
        let newest: Vec<u64> = watcher.rates[at].iter().take(bar.width.into()).rev().copied().collect();
        frame.render_widget(Sparkline::default().data(newest).style(Style::new().fg(Color::Green)), bar);
    }
}

/// Milliseconds, short.
fn millis(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.2}"),
        Some(ms) => format!("{ms:.0}"),
    }
}

/// At most seven characters.
fn count(n: f64) -> String {
    match n {
        0.0..10_000.0 => format!("{n:.0}"),
        10_000.0..1e6 => format!("{:.1}k", n / 1e3),
        1e6..1e9 => format!("{:.2}M", n / 1e6),
        _ => format!("{:.2}G", n / 1e9),
    }
}

fn draw_latencies(frame: &mut Frame<'_>, area: Rect, watcher: &Watcher) {
    let of = |name: &str, metric: &str, labels: &str, rate: f64| {
        let [p50, p99] = [0.5, 0.99].map(|part| millis(watcher.millis(metric, labels, part)));
        Row::new([name.to_owned(), format!("{:>7}", count(rate)), format!("{p50:>6}"), format!("{p99:>6}")])
    };
    let fsync = watcher.now.get("kiss_fsync_duration_seconds_count").copied().unwrap_or_default()
        - watcher.before.get("kiss_fsync_duration_seconds_count").copied().unwrap_or_default();
    let mut rows = vec![of("sync of the log", "kiss_fsync_duration_seconds", "", fsync / watcher.apart)];
    for (labels, rate) in watcher.routes() {
        let label = |name: &str| {
            let (_, rest) = labels.split_once(&format!("{name}=\""))?;
            rest.split_once('"').map(|(value, _)| value)
        };
        let route = label("route").unwrap_or_default().trim_start_matches("/v1").replace("{collection}", "…");
        let status = label("status").filter(|status| !status.starts_with('2')).unwrap_or_default();
        let name = format!("{} {route} {status}", label("method").unwrap_or_default());
        rows.push(of(&name, "kiss_http_request_duration_seconds", &labels, rate));
    }
    let widths = [Constraint::Min(10), Constraint::Length(7), Constraint::Length(6), Constraint::Length(6)];
    let header = Row::new(["", "     /s", "p50 ms", "p99 ms"]).dim();
    frame.render_widget(Table::new(rows, widths).header(header).block(titled("latency")), area);
}

fn draw_numbers(frame: &mut Frame<'_>, area: Rect, watcher: &Watcher) {
    let cell = |(name, metric): (&str, &str)| {
        let value = watcher.gauge(metric);
        let text = if metric.ends_with("_bytes") { format!("{}B", count(value)) } else { count(value) };
        format!("{name:<7.7}{text:>8} ")
    };
    let lines: Vec<Line<'_>> =
        GAUGES.chunks(2).map(|pair| Line::from(pair.iter().copied().map(cell).collect::<String>())).collect();
    frame.render_widget(Paragraph::new(lines).block(titled("now")), area);
}

fn draw_collections(frame: &mut Frame<'_>, area: Rect, watcher: &Watcher) {
    let row = |c: &serde_json::Value| {
        let number = |value: &serde_json::Value| format!("{:>7}", count(value.as_f64().unwrap_or_default()));
        Row::new([
            c["collection"].as_str().unwrap_or_default().to_owned(),
            format!("{} {}", c["dim"], c["metric"].as_str().unwrap_or_default()),
            number(&c["count"]),
            number(&c["index"]["pending"]),
        ])
    };
    let mut by_count: Vec<&serde_json::Value> = watcher.collections.iter().collect();
    by_count.sort_by_key(|c| std::cmp::Reverse(c["count"].as_u64()));
    let widths = [Constraint::Min(10), Constraint::Length(12), Constraint::Length(7), Constraint::Length(7)];
    let header = Row::new(["", "dim", "vectors", "pending"]).dim();
    let table = Table::new(by_count.into_iter().map(row), widths).header(header);
    frame.render_widget(table.block(titled("collections")), area);
}

fn event_line(text: &str) -> Line<'_> {
    let (revision, rest) = text.split_once(' ').unwrap_or(("", text));
    let (event_type, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    let colour = match event_type {
        "reset" => Color::Red,
        "state_deleted" | "vector_deleted" | "collection_deleted" => Color::Yellow,
        _ => Color::Green,
    };
    Line::from(vec![
        Span::from(format!("{revision} ")).dim(),
        Span::from(format!("{event_type} ")).fg(colour),
        Span::from(rest),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_what_came_between_two_looks() {
        let text = |a, b, c| {
            samples(&format!(
                "# TYPE x histogram\nx_bucket{{le=\"1.0\",m=\"GET\"}} {a}\nx_bucket{{le=\"2.0\",m=\"GET\"}} {b}\nx_bucket{{le=\"+Inf\",m=\"GET\"}} {c}\nx_bucket{{le=\"1.0\",m=\"PUT\"}} 99\n"
            ))
        };
        let (before, now) = (text(10, 10, 10), text(10, 20, 20));
        assert_eq!(quantile(&before, &now, "x", "m=\"GET\"", 0.5), Some(1.5));
        assert_eq!(quantile(&before, &text(10, 10, 20), "x", "m=\"GET\"", 0.5), Some(2.0), "beyond the last bound");
        assert_eq!(quantile(&before, &before, "x", "m=\"GET\"", 0.5), None);
        assert_eq!(rate(&before, &now, "x_bucket", 2.0), 10.0);
    }
}
