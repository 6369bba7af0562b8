//! The tensors that a pickled state dict of PyTorch names: a reader that runs no code, and takes no more memory than the file.
//!
//! Candle has one, which a file can bring down: its values are copied from the memo, so a hundred bytes fill the memory, and
//! are freed by recursion, so a deep nest overflows the stack. Here values are shared, and nests are shallow.

use safetensors::Dtype;
use std::rc::Rc;

/// Levels of tuples: a tensor has four.
const DEPTH: u8 = 16;

/// A tensor in a storage.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Pickled {
    pub storage: Rc<Storage>,
    /// In elements.
    pub offset: u64,
    pub shape: Vec<u64>,
    pub stride: Vec<u64>,
}

/// Values in a row, somewhere in the file.
#[derive(Debug, PartialEq)]
pub(super) struct Storage {
    pub key: Rc<str>,
    pub dtype: Dtype,
    pub len: u64,
}

/// A tensor and its name.
pub(super) type Named = (Rc<str>, Rc<Pickled>);

/// What a pickle holds, as far as tensors need it.
#[derive(Debug, Clone)]
enum Value {
    Mark,
    /// Whatever has no part in tensors.
    Other,
    Int(i64),
    Text(Rc<str>),
    /// A function or a class, by its full name.
    Global(Rc<str>),
    /// With the number of levels of it.
    Tuple(Rc<[Value]>, u8),
    /// Lists and dicts change after they were shared, so they live in the machine.
    List(usize),
    Dict(usize),
    Storage(Rc<Storage>),
    Tensor(Rc<Pickled>),
}

/// The pickle machine: one value after another is read from the same bytes.
pub(super) struct Unpickler<'a> {
    bytes: &'a [u8],
    stack: Vec<Value>,
    memo: std::collections::HashMap<u32, Value>,
    lists: Vec<Vec<Value>>,
    dicts: Vec<Vec<(Value, Value)>>,
    /// The storages that were named, in order.
    pub storages: Vec<Rc<Storage>>,
}

impl<'a> Unpickler<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        let (stack, memo) = (Vec::new(), std::collections::HashMap::new());
        Self { bytes, stack, memo, lists: Vec::new(), dicts: Vec::new(), storages: Vec::new() }
    }

    /// The bytes after the values that were read.
    pub fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    /// Passes a value over.
    pub fn skip(&mut self) -> Result<(), String> {
        self.load().map(drop)
    }

    /// Reads a dict, and gives its tensors by name.
    pub fn tensors(&mut self) -> Result<Vec<Named>, String> {
        let Value::Dict(dict) = self.load()? else { return Err("it holds no dict of tensors".into()) };
        let pairs = self.dicts.get_mut(dict).map(std::mem::take).unwrap_or_default();
        let tensor = |pair| if let (Value::Text(name), Value::Tensor(tensor)) = pair { Some((name, tensor)) } else { None };
        Ok(pairs.into_iter().filter_map(tensor).collect())
    }

    /// Reads a list of names.
    pub fn names(&mut self) -> Result<Vec<Rc<str>>, String> {
        let Value::List(list) = self.load()? else { return Err("it holds no list of storages".into()) };
        let values = self.lists.get_mut(list).map(std::mem::take).unwrap_or_default();
        Ok(values.into_iter().filter_map(|value| if let Value::Text(name) = value { Some(name) } else { None }).collect())
    }

    fn load(&mut self) -> Result<Value, String> {
        self.stack.clear();
        self.memo.clear();
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                code => self.step(code)?,
            }
        }
    }

    fn step(&mut self, code: u8) -> Result<(), String> {
        let value = match code {
            0x80 => return self.byte().map(drop),
            0x95 => return self.take(8).map(drop),
            b'(' => Value::Mark,
            b'N' | 0x88 | 0x89 => Value::Other,
            b'G' => {
                self.take(8)?;
                Value::Other
            }
            b'K' => Value::Int(self.byte()?.into()),
            b'M' => Value::Int(self.number(2)?),
            b'J' => Value::Int(i64::from(self.number(4)? as i32)),
            0x8a => {
                let len = self.byte()?;
                let bytes = self.take(len.into())?;
                long(bytes).map_or(Value::Other, Value::Int)
            }
            b'X' | b'T' => self.text(4)?,
            b'U' | 0x8c => self.text(1)?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                Value::Global(format!("{module}.{name}").into())
            }
            0x93 => match (self.pop()?, self.pop()?) {
                (Value::Text(name), Value::Text(module)) => Value::Global(format!("{module}.{name}").into()),
                _ => return Err("a name is no text".into()),
            },
            b'q' => return self.remember(1),
            b'r' => return self.remember(4),
            0x94 => {
                let value = self.stack.last().cloned().ok_or_else(empty)?;
                self.memo.insert(self.memo.len() as u32, value);
                return Ok(());
            }
            b'h' => self.recall(1)?,
            b'j' => self.recall(4)?,
            b')' => Value::Tuple(Rc::new([]), 1),
            b't' => {
                let values = self.marked()?;
                tuple(values)?
            }
            0x85..=0x87 => {
                let at = self.stack.len().checked_sub(usize::from(code - 0x84)).ok_or_else(empty)?;
                tuple(self.stack.split_off(at))?
            }
            b']' => {
                self.lists.push(Vec::new());
                Value::List(self.lists.len() - 1)
            }
            b'}' => self.dict(),
            b'a' => {
                let value = self.pop()?;
                return self.append([value]);
            }
            b'e' => {
                let values = self.marked()?;
                return self.append(values);
            }
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                return self.set([key, value]);
            }
            b'u' => {
                let values = self.marked()?;
                return self.set(values);
            }
            // The state of an object: of an ordered dict, versions of its modules.
            b'b' => return self.pop().map(drop),
            b'0' => return self.pop().map(drop),
            b'Q' => {
                let id = self.pop()?;
                self.storage(&id)
            }
            b'R' | 0x81 => {
                let (arguments, function) = (self.pop()?, self.pop()?);
                self.call(&function, &arguments)
            }
            code => return Err(format!("the pickle has the code {code:#04x}, which no state dict needs")),
        };
        self.stack.push(value);
        Ok(())
    }

    /// What the few functions that make tensors would return; no other function is known.
    fn call(&mut self, function: &Value, arguments: &Value) -> Value {
        let (Value::Global(function), Value::Tuple(arguments, _)) = (function, arguments) else { return Value::Other };
        match (&**function, &**arguments) {
            ("collections.OrderedDict", _) => self.dict(),
            ("torch._utils._rebuild_parameter", [tensor, ..]) => tensor.clone(),
            ("torch._tensor._rebuild_from_type_v2", [function @ Value::Global(name), _, arguments, ..])
                if name.starts_with("torch._utils.") =>
            {
                self.call(function, arguments)
            }
            (
                "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
                [Value::Storage(storage), Value::Int(offset), Value::Tuple(shape, _), Value::Tuple(stride, _), ..],
            ) => {
                let numbers = |values: &[Value]| values.iter().map(number).collect::<Option<Vec<_>>>();
                match (u64::try_from(*offset), numbers(shape), numbers(stride)) {
                    (Ok(offset), Some(shape), Some(stride)) => {
                        Value::Tensor(Rc::new(Pickled { storage: storage.clone(), offset, shape, stride }))
                    }
                    _ => Value::Other,
                }
            }
            _ => Value::Other,
        }
    }

    /// A storage by its name: `("storage", type, key, device, length)`. Those of types without a name here are passed over.
    fn storage(&mut self, id: &Value) -> Value {
        let Value::Tuple(id, _) = id else { return Value::Other };
        let [Value::Text(_), Value::Global(class), Value::Text(key), _, len, ..] = &**id else { return Value::Other };
        let dtype = match class.rsplit('.').next() {
            Some("FloatStorage") => Dtype::F32,
            Some("HalfStorage") => Dtype::F16,
            Some("BFloat16Storage") => Dtype::BF16,
            Some("DoubleStorage") => Dtype::F64,
            Some("LongStorage") => Dtype::I64,
            Some("IntStorage") => Dtype::I32,
            Some("ShortStorage") => Dtype::I16,
            Some("CharStorage") => Dtype::I8,
            Some("ByteStorage") => Dtype::U8,
            Some("BoolStorage") => Dtype::BOOL,
            _ => return Value::Other,
        };
        let Some(len) = number(len) else { return Value::Other };
        let storage = Rc::new(Storage { key: key.clone(), dtype, len });
        self.storages.push(storage.clone());
        Value::Storage(storage)
    }

    fn dict(&mut self) -> Value {
        self.dicts.push(Vec::new());
        Value::Dict(self.dicts.len() - 1)
    }

    fn append(&mut self, values: impl IntoIterator<Item = Value>) -> Result<(), String> {
        match self.stack.last() {
            Some(&Value::List(list)) => self.lists[list].extend(values),
            _ => return Err("something is appended to what is no list".into()),
        }
        Ok(())
    }

    fn set(&mut self, values: impl IntoIterator<Item = Value>) -> Result<(), String> {
        let mut values = values.into_iter();
        match self.stack.last() {
            Some(&Value::Dict(dict)) => {
                while let (Some(key), Some(value)) = (values.next(), values.next()) {
                    self.dicts[dict].push((key, value));
                }
            }
            // The attributes of some other object.
            Some(Value::Other) => {}
            _ => return Err("something is set in what is no dict".into()),
        }
        Ok(())
    }

    fn remember(&mut self, len: usize) -> Result<(), String> {
        let key = self.number(len)? as u32;
        let value = self.stack.last().cloned().ok_or_else(empty)?;
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, len: usize) -> Result<Value, String> {
        let key = self.number(len)? as u32;
        self.memo.get(&key).cloned().ok_or_else(|| format!("the pickle recalls value {key}, which it did not remember"))
    }

    /// What lies on the stack above the last mark.
    fn marked(&mut self) -> Result<Vec<Value>, String> {
        let at = self.stack.iter().rposition(|value| matches!(value, Value::Mark)).ok_or_else(empty)?;
        let values = self.stack.split_off(at + 1);
        self.stack.pop();
        Ok(values)
    }

    fn pop(&mut self) -> Result<Value, String> {
        self.stack.pop().ok_or_else(empty)
    }

    fn byte(&mut self) -> Result<u8, String> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn number(&mut self, len: usize) -> Result<i64, String> {
        Ok(self.take(len)?.iter().rev().fold(0, |number, &byte| number << 8 | i64::from(byte)))
    }

    fn text(&mut self, len: usize) -> Result<Value, String> {
        let len = self.number(len)? as usize;
        let text = str::from_utf8(self.take(len)?).map_err(|_| "the pickle has a text that is not UTF-8")?;
        Ok(Value::Text(text.into()))
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let len = self.bytes.iter().position(|&byte| byte == b'\n').ok_or_else(ended)?;
        let line = str::from_utf8(self.take(len)?).map_err(|_| "the pickle has a name that is not UTF-8")?;
        self.byte()?;
        Ok(line)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.bytes.split_at_checked(len).ok_or_else(ended)?;
        self.bytes = rest;
        Ok(taken)
    }
}

fn tuple(values: Vec<Value>) -> Result<Value, String> {
    let depth = |value: &Value| if let Value::Tuple(_, depth) = value { *depth } else { 0 };
    let depth = 1 + values.iter().map(depth).max().unwrap_or(0);
    if depth > DEPTH {
        return Err(format!("the pickle nests more than {DEPTH} tuples"));
    }
    Ok(Value::Tuple(values.into(), depth))
}

fn number(value: &Value) -> Option<u64> {
    if let Value::Int(number) = value { u64::try_from(*number).ok() } else { None }
}

/// An integer of up to eight bytes, the lowest first, with its sign in the highest.
fn long(bytes: &[u8]) -> Option<i64> {
    let sign = if bytes.last().is_some_and(|&byte| byte >= 0x80) { -1 } else { 0 };
    (bytes.len() <= 8).then(|| bytes.iter().rev().fold(sign, |number, &byte| number << 8 | i64::from(byte)))
}

fn empty() -> String {
    "the pickle takes a value from an empty stack".into()
}

fn ended() -> String {
    "the pickle ends in the middle".into()
}
