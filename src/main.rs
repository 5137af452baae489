//! The `kiss-vdb` program: flags, logging, open, serve, ordered shutdown.

use anyhow::Context;
use clap::{Arg, ArgAction, ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand, value_parser};
use kiss_vdb::api::auth::Auth;
use kiss_vdb::api::live::StreamThreads;
use kiss_vdb::api::tls::Tls;
use kiss_vdb::api::{App, serve, service};
use kiss_vdb::cli::{self, CliVerb};
use kiss_vdb::config::{Config, Resolved, SETTINGS, Setting};
use kiss_vdb::engine::frame::push_fmt;
use kiss_vdb::engine::{COLLECTION_FILES, Engine, collections_max};
use kiss_vdb::error::Error;
use kiss_vdb::heap::{self, Heap};
use kiss_vdb::turns::{self, Turn};
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpSocket;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

#[global_allocator]
static HEAP: Heap = Heap;

/// A real-time database: keys, events, streams and vectors in one total order, over plain HTTP.
#[derive(Parser)]
#[command(name = "kiss-vdb", version, about, long_about = None, args_conflicts_with_subcommands = true, after_help = cli::EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Verb>,
    #[command(flatten)]
    settings: SettingFlags,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the server (what the bare program does too).
    Serve(Box<SettingFlags>),
    /// Print every setting, its value and where it came from.
    Config(Box<SettingFlags>),
    /// Make, list and revoke the named keys of a key file.
    Keys(kiss_vdb::keys::KeysArgs),
    /// Watch the whole of it work, on a server of its own, every claim checked.
    Demo(kiss_vdb::demo::DemoArgs),
    /// Look through a data directory that no server is using: is it whole, and are the graphs sound?
    Check(kiss_vdb::check::CheckArgs),
    /// Measure a server: this program's own in a temporary directory, or any --url.
    Bench(Box<kiss_vdb::bench::BenchArgs>),
    /// The yardstick `bench --bare` measures against.
    #[command(hide = true)]
    BenchBare(kiss_vdb::bench::BareArgs),
    #[command(flatten)]
    Cli(Box<CliVerb>),
}

/// One flag for each of [`SETTINGS`]. Text, so that a bad value is reported the same way wherever it came from.
struct SettingFlags {
    config: Option<PathBuf>,
    given: Vec<(&'static str, String)>,
}

/// Whether its flag takes no value.
fn is_switch(setting: &Setting) -> bool {
    setting.default == "false"
}

fn flag(setting: &Setting) -> Arg {
    let source = match setting.default {
        "" | "false" => format!("env {}", setting.env),
        default => format!("env {}, default {default}", setting.env),
    };
    let flag = Arg::new(setting.name).long(setting.name.replace('_', "-")).help(format!("{} [{source}]", setting.help));
    if is_switch(setting) {
        return flag.action(ArgAction::SetTrue);
    }
    // What it is: `DIR` of `data_dir`, `STREAMS` of `max_streams_per_client`.
    let kind = setting.name.split("_per_").next().and_then(|name| name.rsplit('_').next()).unwrap_or_default();
    flag.value_name(kind.to_uppercase())
}

impl Args for SettingFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        let config = Arg::new("config").long("config").value_name("FILE").value_parser(value_parser!(PathBuf));
        let config = config.help("Configuration file [default: kiss-vdb.toml, if it exists]");
        command.arg(config).args(SETTINGS.iter().map(flag))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for SettingFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let text = |setting: &Setting| match is_switch(setting) {
            true => matches.get_flag(setting.name).then(|| "true".to_owned()),
            false => matches.get_one::<String>(setting.name).cloned(),
        };
        let given = SETTINGS.iter().filter_map(|setting| Some((setting.name, text(setting)?))).collect();
        Ok(Self { config: matches.get_one("config").cloned(), given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl SettingFlags {
    fn resolve(self) -> Result<Resolved, Error> {
        Resolved::collect(self.config, |name| std::env::var_os(name), self.given)
    }
}

fn main() -> ExitCode {
    // What the database holds, and copies of it, are for their owner alone.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let cli = Cli::parse();
    let result = match cli.command {
        None => cli.settings.resolve().map_err(Into::into).and_then(|r| run_server(&r)),
        Some(Verb::Serve(flags)) => flags.resolve().map_err(Into::into).and_then(|r| run_server(&r)),
        Some(Verb::Demo(args)) => kiss_vdb::demo::run(&args),
        Some(Verb::Keys(args)) => kiss_vdb::keys::run(&args),
        Some(Verb::Check(args)) => kiss_vdb::check::run(&args),
        Some(Verb::Config(flags)) => flags.resolve().map_err(Into::into).and_then(|r| print_config(&r)),
        Some(Verb::Bench(args)) => kiss_vdb::bench::run(&args),
        Some(Verb::BenchBare(args)) => kiss_vdb::bench::run_bare(&args),
        Some(Verb::Cli(verb)) => return cli::run(*verb, Cli::command()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kiss-vdb: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_config(resolved: &Resolved) -> anyhow::Result<()> {
    let mut table = String::new();
    for (name, value, source) in resolved.rows() {
        push_fmt(&mut table, format_args!("{name:<27} {value:<22} {source}\n"));
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(table.as_bytes()).and_then(|()| out.flush()) {
        // Its reader has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
        written => written?,
    }
    // Printed first, so that a bad value can be seen with its source; then refused like a start would be.
    resolved.build()?;
    Ok(())
}

fn run_server(resolved: &Resolved) -> anyhow::Result<()> {
    let config = resolved.build()?;
    // Before there are other threads.
    heap::keep_giving_back().context("cannot start a thread")?;
    let _log = kiss_vdb::logging::start(&config)?;
    // A file larger than the process may write is an error like a full disk's, and not its end.
    // SAFETY: nothing is called by it.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    check_threads(&config)?;
    let file_limit = serve::raise_file_limit();
    // Some files are the engine's and the runtime's own.
    let others = 128 + collections_max(file_limit) * COLLECTION_FILES;
    let left = usize::try_from(file_limit).unwrap_or(usize::MAX).saturating_sub(others);
    let max_connections = config.max_connections.min(left.max(16));
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if config.worker_threads > 0 {
        runtime.worker_threads(config.worker_threads);
    }
    // All begin as batch work; those for blocking work, which never look, remain so.
    let look = || turns::look_at_requests(Turn::Behind);
    runtime.on_thread_start(|| turns::take(Turn::Behind)).on_thread_park(look);
    // Large scans and parsing, now rather than when first needed: threads take after whoever starts them.
    let pool = rayon::ThreadPoolBuilder::new()
        .thread_name(|n| format!("scan-{n}"))
        .start_handler(|_| turns::take(Turn::Behind));
    pool.build_global().context("cannot start the threads for searches")?;
    let runtime = runtime.enable_all().build().context("cannot start the threads for requests")?;
    // On this thread: connections are accepted apart from where requests are served.
    let accepting = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    // What can be wrong at once is told at once, and not after a recovery.
    let socket = bind(SocketAddr::new(config.bind_addr, config.port))?;
    let tls = config.tls.as_ref().map(|(cert, key)| Tls::new(cert, key)).transpose()?;
    let stop = Stop::on_signals(&runtime)?;
    let (engine, threads) = Engine::open(&config).map_err(with_cure)?;
    heap::give_back();
    let server = run(&config, engine, max_connections, socket, tls, runtime.handle().clone(), stop.opened());
    let served = accepting.block_on(server);
    threads.stop();
    // Tasks that outlived the drain are cut here rather than waited for.
    runtime.shutdown_background();
    served
}

/// Threads beside those there are one of for each core: the engine's and the runtimes' own, and some for blocking calls.
const OTHER_THREADS: usize = 12;

/// Starts as many threads as a server has, and ends them: where the system does not allow them it says so now, and what to do.
fn check_threads(config: &Config) -> anyhow::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let workers = if config.worker_threads > 0 { config.worker_threads } else { cores };
    // For requests; for scans, and for links.
    let needed = workers + 2 * cores + config.stream_threads.max(1) + OTHER_THREADS;
    let gate = std::sync::RwLock::new(());
    std::thread::scope(|scope| {
        let _closed = gate.write();
        for started in 0..needed {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || drop(gate.read()));
            thread.with_context(|| {
                format!(
                    "the system lets this process start {started} threads, and it takes {needed}: raise the limit (ulimit -u; the \
                     pids of a container or TasksMax of a unit; ulimit -v), or lower WORKER_THREADS and STREAM_THREADS"
                )
            })?;
        }
        Ok(())
    })
}

/// What to do about an error that a start ends with, where the system's word says little.
fn with_cure(error: Error) -> anyhow::Error {
    let cure = if error.is_storage_full() {
        "a start needs room for a segment of the log, an eighth of MAX_LOG_MB and at most 64 MiB: free some, raise the limit (ulimit -f), or lower MAX_LOG_MB"
    } else if error.is_out_of_files() {
        "raise the limit of open files (ulimit -n, LimitNOFILE of a unit): each collection takes some"
    } else {
        return error.into();
    };
    anyhow::anyhow!("{error}; {cure}")
}

/// What a signal does.
struct Stop {
    wanted: Arc<watch::Sender<bool>>,
    is_open: Arc<AtomicBool>,
}

impl Stop {
    /// From here on SIGTERM and SIGINT are ours. By itself the system ends nothing that runs as the first process of a container.
    fn on_signals(runtime: &Runtime) -> anyhow::Result<Self> {
        let _entered = runtime.enter();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = Self { wanted: Arc::new(watch::channel(false).0), is_open: Arc::default() };
        let (wanted, is_open) = (Arc::clone(&stop.wanted), Arc::clone(&stop.is_open));
        runtime.spawn(async move {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            };
            tracing::info!(signal = name, "stopping");
            wanted.send_replace(true);
            if !is_open.load(Ordering::SeqCst) {
                // Nothing has begun that a recovery does not do again.
                std::process::exit(0);
            }
        });
        Ok(stop)
    }

    /// The server is open: from here on it stops in order.
    fn opened(&self) -> watch::Receiver<bool> {
        self.is_open.store(true, Ordering::SeqCst);
        self.wanted.subscribe()
    }
}

fn bind(address: SocketAddr) -> anyhow::Result<TcpSocket> {
    serve::bind(address).map_err(|error| {
        let cure = match error.kind() {
            ErrorKind::AddrNotAvailable => {
                "this machine has no such address; choose another with --bind-addr: 127.0.0.1 for this machine alone, 0.0.0.0 for all it has"
            }
            ErrorKind::PermissionDenied => "choose a port above 1023 with --port",
            _ => "is another server using the port? Choose another with --port, or 0 for any free one",
        };
        anyhow::anyhow!("cannot listen on {address}: {cure}: {error}")
    })
}

async fn run(
    config: &Config,
    engine: Engine,
    max_connections: usize,
    socket: TcpSocket,
    tls: Option<Tls>,
    requests: Handle,
    stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let listener = serve::listen(socket).context("cannot listen")?;
    let app = App::new(engine, config)?;
    let acceptor = tls.as_ref().map(Tls::acceptor).transpose()?;
    // Reading many keys takes long: not on the thread that accepts.
    requests.spawn(Auth::keep_fresh(app.clone()));
    if let Some(tls) = tls {
        requests.spawn(tls.keep_fresh());
    }
    if let Err(error) = print_banner(config, listener.local_addr()?) {
        tracing::warn!(%error, "cannot say on stdout that the server is ready");
    }
    notify_ready();
    let streams = StreamThreads::start(config.stream_threads).context("cannot start the threads for streams")?;
    let runtimes = serve::Runtimes { requests, streams };
    serve::serve(listener, service(app.clone(), config), app, max_connections, acceptor, runtimes, stopped).await;
    Ok(())
}

/// Tells systemd, if it asked to be told, that requests are accepted (sd_notify(3)).
fn notify_ready() {
    let Some(address) = std::env::var_os("NOTIFY_SOCKET") else { return };
    if let Err(error) = send_ready(&address) {
        tracing::warn!(%error, "cannot tell NOTIFY_SOCKET that the server is ready");
    }
}

fn send_ready(address: &std::ffi::OsStr) -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1\n", &address).map(drop)
}

/// The first line on stdout once requests are accepted: scripts wait for it.
fn print_banner(config: &Config, address: SocketAddr) -> std::io::Result<()> {
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let url = format!("{scheme}://{address}");
    let (data, durability) = match &config.data_dir {
        None => ("in memory".to_owned(), "ephemeral"),
        Some(dir) => {
            (std::fs::canonicalize(dir).unwrap_or_else(|_| dir.clone()).display().to_string(), config.fsync.as_str())
        }
    };
    let key = if config.needs_key() { "key needed" } else { "open, no key" };
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "kiss-vdb {} ready at {url} · console {url}/ · data {data} · durability {durability} · {key}",
        kiss_vdb::VERSION
    )?;
    out.flush()?;
    Ok(())
}
