//! Names as reports write them.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use crate::task::Frame;
use crate::task::human::safe;

/// A function's name without type arguments, as runtimes print it:
/// `main.Map[go.shape.int,go.shape.string].func1` is `main.Map[...].func1`.
pub(super) fn function(name: &str) -> Cow<'_, str> {
    let (Some(open), Some(close)) = (name.find('['), name.rfind(']')) else {
        return safe(name);
    };
    if close <= open {
        return safe(name);
    }
    let short = format!("{}[...]{}", &name[..open], &name[close + 1..]);
    Cow::Owned(safe(&short).into_owned())
}

/// Length on a terminal, in characters.
pub(super) fn width(text: &str) -> usize {
    text.chars().count()
}

/// Cuts the middle out of a name, whole directories where that is enough:
/// `github.com/foo/…/bar.(*T).Serve.func1`.
pub(super) fn shorten(name: &str, max: usize) -> Cow<'_, str> {
    let length = width(name);
    if length <= max {
        return name.into();
    }
    if max == 0 {
        return "".into();
    }
    if let Some((path, last)) = name.rsplit_once('/') {
        // Two characters for the ellipsis and the slash behind it.
        let room = max.checked_sub(width(last) + 2);
        if let Some(room) = room {
            let mut head = "";
            for (slash, _) in path.match_indices('/') {
                let candidate = &path[..=slash];
                if width(candidate) > room {
                    break;
                }
                head = candidate;
            }
            return format!("{head}…/{last}").into();
        }
    }
    // The end tells more than the beginning.
    let head = (max - 1) / 3;
    let tail = max - 1 - head;
    let text: String = name
        .chars()
        .take(head)
        .chain(['…'])
        .chain(name.chars().skip(length - tail))
        .collect();
    text.into()
}

/// Source files by the last parts of their paths, as many (from two) as tell
/// them apart.
pub(super) struct FileNames<'a> {
    parts: HashMap<&'a str, usize>,
}

/// The last `parts` components of a path.
fn last_parts(path: &str, parts: usize) -> &str {
    match path.rmatch_indices('/').nth(parts.saturating_sub(1)) {
        // The slash of an absolute path's root stays.
        Some((0, _)) | None => path,
        Some((slash, _)) => &path[slash + 1..],
    }
}

/// `file.go:17`; the file alone where the line is not known.
pub(super) fn file_line(frame: &Frame) -> String {
    let file = safe(last_parts(&frame.file, 2));
    match frame.line {
        0 => file.into_owned(),
        line => format!("{file}:{line}"),
    }
}

impl<'a> FileNames<'a> {
    /// The names of all files of a report.
    pub(super) fn new(files: impl Iterator<Item = &'a str>) -> FileNames<'a> {
        let mut open: Vec<&str> = files.collect::<HashSet<_>>().into_iter().collect();
        let mut parts = HashMap::new();
        let mut count = 2;
        while !open.is_empty() {
            let mut same: HashMap<&str, Vec<&str>> = HashMap::new();
            for file in open.drain(..) {
                same.entry(last_parts(file, count)).or_default().push(file);
            }
            for (short, files) in same {
                for file in &files {
                    if files.len() == 1 || short.len() == file.len() {
                        parts.insert(*file, count);
                    } else {
                        open.push(file);
                    }
                }
            }
            count += 1;
        }
        FileNames { parts }
    }

    /// `dir/file.go:17`.
    pub(super) fn place(&self, frame: &'a Frame) -> String {
        let parts = self.parts.get(&*frame.file).copied().unwrap_or(2);
        let file = safe(last_parts(&frame.file, parts));
        match frame.line {
            0 => file.into_owned(),
            line => format!("{file}:{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_arguments_are_left_out() {
        assert_eq!(function("main.f"), "main.f");
        assert_eq!(
            function("main.Map[go.shape.int,go.shape.[]uint8].func1"),
            "main.Map[...].func1"
        );
        assert_eq!(function("main.f]["), "main.f][");
    }

    #[test]
    fn long_names_lose_directories_first() {
        let name = "github.com/foo/deep/down/below/bar.(*T).Serve.func1";
        assert_eq!(shorten(name, 60), name);
        assert_eq!(shorten(name, 40), "github.com/foo/…/bar.(*T).Serve.func1");
        assert_eq!(shorten(name, 30), "…/bar.(*T).Serve.func1");
        assert_eq!(shorten(name, 15), "gith…erve.func1");
        for max in 0..60 {
            assert!(width(&shorten(name, max)) <= max, "{max}");
        }
        assert_eq!(shorten("main.größe", 7), "ma…röße");
    }

    #[test]
    fn files_are_named_apart() {
        let files = [
            "/a/x/server/main.go",
            "/b/x/server/main.go",
            "/usr/lib/go/net/http/server.go",
            "main.go",
            "/main.go",
        ];
        let names = FileNames::new(files.iter().copied());
        let place = |file: &'static str| {
            let short = last_parts(file, names.parts[file]);
            short.to_owned()
        };
        assert_eq!(place(files[0]), "/a/x/server/main.go");
        assert_eq!(place(files[1]), "/b/x/server/main.go");
        assert_eq!(place(files[2]), "http/server.go");
        assert_eq!(place(files[3]), "main.go");
        assert_eq!(place(files[4]), "/main.go");
    }
}
