# ruff: noqa: E501
"""Sentences written by hand with the private values in them marked, and sentences without any.

Independent of the generator in ``privacy_corpus`` and of the detectors: chats, forms, notes, logs, rows of
tables, letters, in Chinese (mainland, Hong Kong, Taiwan) and English. All values are invented; where there is
a checksum it agrees. ``⟦KIND|value⟧`` marks a value and ``⏎`` a line break; one sample a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MARK = re.compile(r"⟦([A-Z]+)\|([^⟧]+)⟧")


@dataclass(frozen=True)
class Sample:
    """A text and its values: start, end, kind."""

    text: str
    spans: tuple[tuple[int, int, str], ...]


def parse(lines: str) -> list[Sample]:
    """The samples of a block of lines."""
    samples = []
    for line in lines.strip().split("\n"):
        raw = line.replace("⏎", "\n")
        text, spans, last = "", [], 0
        for mark in _MARK.finditer(raw):
            text += raw[last : mark.start()]
            spans.append((len(text), len(text) + len(mark[2]), mark[1]))
            text += mark[2]
            last = mark.end()
        samples.append(Sample(text + raw[last:], tuple(spans)))
    return samples


# Written before the detectors were changed for any of them.
FIRST = r"""
您好，我是⟦NAME|周雨桐⟧，订单一直没发货，我的手机号是⟦PHONE|13916728345⟧，麻烦尽快处理
亲，麻烦报一下您的收货人姓名和电话呢⏎⟦NAME|孙晓燕⟧ ⟦PHONE|186 2138 9047⟧
客服：请问怎么称呼您？⏎用户：我姓李，⟦NAME|李建国⟧
用户：电话⟦PHONE|1 3 5-8 8 2 1-4 4 0 7⟧，不要打错了
加我微信⟦USER|lulu_0823⟧，备注来意
我的QQ是⟦USER|2839471056⟧，邮箱就是QQ邮箱
微信同号：⟦PHONE|15811203398⟧
vx：⟦USER|wangmei1990⟧ 看到请加
V信 ⟦USER|chenkai-88⟧ 随时联系
请加微：⟦USER|fyt_2011⟧
退款请打到支付宝⟦PHONE|13777829910⟧
退款账号是建设银行⟦CARD|6217 1716 7123 4312 226⟧，户名⟦NAME|何佳怡⟧
工商银行 ⟦CARD|6222056148970712489⟧ ⟦NAME|马国强⟧
卡号：⟦CARD|6228-4107-5690-0720-030⟧，开户行农行中关村支行
我的卡是⟦CARD|4539 1351 1971 8142⟧，有效期 08/27，CVV ⟦SECRET|339⟧
身份证：⟦IDCARD|110108198706154537⟧
身份证号码⟦IDCARD|31011519921103 3317⟧请核对
证件号码是⟦IDCARD|440304 20010228 4789⟧
sfz ⟦IDCARD|510107196509099320⟧
⟦NAME|林志远⟧，身份证⟦IDCARD|330106197804208803⟧，电话⟦PHONE|0571-87654321⟧
ID:⟦IDCARD|420111199912124078⟧
身份证尾号4078，全号是⟦IDCARD|4201 1119 9912 1240 78⟧
居民身份证　⟦IDCARD|３２０５８３１９８５０１１７２３８８⟧
我身份证号⟦IDCARD|六一零一一三二零零四零七零六六二五三⟧
收件人：⟦NAME|吴思远⟧ 电话：⟦PHONE|13402198876⟧ 地址：⟦ADDRESS|上海市闵行区莘庄镇七莘路1188弄23号602室⟧
寄：⟦NAME|赵敏⟧ ⟦PHONE|17700128834⟧ ⟦ADDRESS|广东省深圳市南山区科技园南区深南大道9996号松日鼎盛大厦12楼⟧
收：⟦NAME|钱学明⟧，⟦PHONE|18958120345⟧，⟦ADDRESS|浙江省杭州市余杭区五常街道联胜路10号⟧
送到⟦ADDRESS|海淀区知春路76号翠宫饭店6层⟧前台就行
快递放⟦ADDRESS|万科城三期15栋2单元1803⟧门口
地址：⟦ADDRESS|成都市武侯区天府三街199号太平洋保险金融大厦B座15楼⟧
家庭住址：⟦ADDRESS|湖北省武汉市洪山区珞喻路152号华中师范大学教职工宿舍北区8栋301⟧
我住在⟦ADDRESS|西安市雁塔区科技二路65号清华科技园D座⟧
现住址 ⟦ADDRESS|河南省周口市太康县马厂镇前何村三组⟧
户籍地址：⟦ADDRESS|四川省达州市渠县三汇镇重石子社区6组47号⟧
⟦ADDRESS|北京市朝阳区建国路88号SOHO现代城A座1201室⟧，找⟦NAME|刘芳⟧
房子在⟦ADDRESS|天河区体育东路28号方圆大厦1705房⟧
⟦ADDRESS|香港九龍尖沙咀彌敦道132號美麗華大廈15樓1502室⟧
⟦ADDRESS|香港中環德輔道中68號萬宜大廈8樓⟧
⟦ADDRESS|臺北市大安區忠孝東路四段216巷27弄8號3樓⟧
⟦ADDRESS|新北市板橋區文化路一段188巷5號⟧
⟦ADDRESS|高雄市左營區博愛二路777號⟧，收件人：⟦NAME|陳怡君⟧
我係⟦NAME|陳大文⟧，電話⟦PHONE|9123 4567⟧
聯絡電話：⟦PHONE|+852 6543 2109⟧
手機：⟦PHONE|0912-345-678⟧
市話 ⟦PHONE|(02) 2712-3456⟧ 轉分機 105
身分證字號：⟦IDCARD|A190707002⟧
身份證號碼 ⟦IDCARD|K316538(8)⟧
HKID: ⟦IDCARD|Y230923(6)⟧
香港身份证 ⟦IDCARD|Z2804264⟧
姓名：⟦NAME|林美玲⟧ 身分證：⟦IDCARD|F212780235⟧ 生日：⟦BIRTHDATE|民國78年5月12日⟧
患者⟦NAME|王秀兰⟧，女，68岁，住院号：⟦ACCOUNT|0023498712⟧，主诉胸闷3天
病案号：⟦ACCOUNT|ZY20230456⟧ 姓名：⟦NAME|高翔⟧ 性别：男 出生日期：⟦BIRTHDATE|1956-03-01⟧
患者姓名：⟦NAME|徐国栋⟧，门诊号⟦ACCOUNT|M1029384⟧，家属电话⟦PHONE|13667890123⟧
主治医师：⟦NAME|黄文斌⟧，记录时间 2023-05-06
病历号 ⟦ACCOUNT|10293847⟧；既往体健，否认药物过敏史
姓名 ⟦NAME|邓超群⟧⏎性别 男⏎民族 汉⏎出生 ⟦BIRTHDATE|1995年8月19日⟧⏎住址 ⟦ADDRESS|南宁市青秀区民族大道100号⟧⏎公民身份号码 ⟦IDCARD|450102199508197338⟧
医保卡号：⟦ACCOUNT|A00123456⟧
个人简历⏎姓名：⟦NAME|宋雨轩⟧⏎出生年月：⟦BIRTHDATE|1998年7月⟧⏎电话：⟦PHONE|139-0012-7788⟧⏎邮箱：⟦EMAIL|songyuxuan98@163.com⟧
求职意向：后端开发⏎⟦NAME|郭子豪⟧ | 男 | 1996.05 | ⟦PHONE|15267891234⟧ | ⟦EMAIL|guozihao@foxmail.com⟧
甲方（出租方）：⟦NAME|张丽华⟧ 身份证号：⟦IDCARD|230102195603018482⟧
乙方：⟦NAME|韩冰⟧，身份证号码：⟦IDCARD|371002201010153114⟧，联系方式：⟦PHONE|18863109988⟧
甲方：⟦ORG|杭州云栖数据科技有限公司⟧，统一社会信用代码：⟦COMPANYID|91330106MA2112X68Q⟧
纳税人识别号⟦COMPANYID|91110108MA6179A391⟧
开票信息：⟦ORG|深圳市宏远电子有限公司⟧ 税号：⟦COMPANYID|91440300MA598C6L9Y⟧ 开户行：招商银行 账号：⟦ACCOUNT|755901234510801⟧
信用代码 ⟦COMPANYID|91310115A6833BT777⟧
法定代表人：⟦NAME|梁永昌⟧
委托代理人⟦NAME|冯志刚⟧，北京市中伦律师事务所律师
犯罪嫌疑人⟦NAME|杜某军⟧，男，⟦BIRTHDATE|1973年10月25日⟧出生，身份证号码⟦IDCARD|350203197310255116⟧
被询问人：⟦NAME|曾庆华⟧，身份证号：⟦IDCARD|653101198808083876⟧，现住⟦ADDRESS|喀什市人民东路12号院3号楼2单元501室⟧
我叫⟦NAME|彭小丽⟧，今年三十五岁，住⟦ADDRESS|长沙市岳麓区麓山南路932号⟧
报警人称其驾驶⟦PLATE|粤B·8K2M5⟧小型轿车
嫌疑车辆车牌号⟦PLATE|京AF09231⟧
车牌：⟦PLATE|沪AD12345⟧（新能源）
我的车是⟦PLATE|苏E7X9K2⟧，停在B2
⟦PLATE|浙A·D88976⟧违停被拍
挪车电话⟦PHONE|13588001234⟧，⟦PLATE|川G 3R8Q9⟧
挂车号牌⟦PLATE|冀B1234挂⟧
车牌号 ⟦PLATE|粤Z·F023港⟧
车架号：⟦VIN|LSVA7MCB61P621415⟧，发动机号：⟦VIN|H12345678⟧
VIN码⟦VIN|LFVGKZ9K2W5218110⟧
驾驶证号：⟦LICENCE|610113200407066253⟧，档案编号⟦LICENCE|610100123456⟧
护照号码：⟦PASSPORT|E12345678⟧
护照 ⟦PASSPORT|EA1234567⟧ 已过期
港澳通行证⟦PASSPORT|C12345678⟧
回乡证号码 ⟦PASSPORT|H1234567801⟧
台胞证号：⟦PASSPORT|01234567⟧
生日⟦BIRTHDATE|1990/2/14⟧
小孩⟦BIRTHDATE|2019年6月1日⟧出生，打疫苗
出生：⟦BIRTHDATE|一九八五年三月四日⟧
本人⟦NAME|罗建平⟧，系⟦ORG|四川长虹电器股份有限公司⟧员工
群公告：请@⟦NAME|王磊⟧ 明天带电脑
【物业通知】5栋⟦NAME|胡女士⟧您的快递到了，联系⟦PHONE|028-85551234⟧
班级群：⟦NAME|李梓涵⟧妈妈电话⟦PHONE|13699887766⟧
接龙⏎1. ⟦NAME|张伟⟧ 2大1小 ⟦PHONE|13512345670⟧⏎2. ⟦NAME|刘洋⟧ 1大 ⟦PHONE|13612345671⟧
姓名,电话,身份证⏎⟦NAME|谢婷婷⟧,⟦PHONE|13012349876⟧,⟦IDCARD|810000199205049812⟧
⟦NAME|马晓东⟧	⟦PHONE|18612340987⟧	⟦EMAIL|mxd@sina.com⟧	⟦ADDRESS|北京市丰台区方庄南路9号院⟧
{"name":"⟦NAME|欧阳静⟧","mobile":"⟦PHONE|15900112233⟧","idNo":"⟦IDCARD|110108198706154537⟧"}
{"realName": "⟦NAME|蒋欣⟧", "bankCard": "⟦CARD|6217036441855345789⟧", "addr": "⟦ADDRESS|重庆市渝北区龙山街道余松一支路6号⟧"}
手机号码：⟦PHONE|+86 139 1672 8345⟧
电话（⟦PHONE|021）58765432⟧
传真：⟦PHONE|86-10-62781234⟧
总机⟦PHONE|0755-26001234-8012⟧
热线⟦PHONE|400-820-8820⟧
打我小灵通⟦PHONE|020-34567890⟧
紧急联系人：⟦NAME|田甜⟧（母女）⟦PHONE|13800991122⟧
手机尾号8345，完整的是⟦PHONE|幺三九一六七二八三四五⟧
我电话是⟦PHONE|一三五八八二一四四零七⟧
邮箱 ⟦EMAIL|zhaoming(at)qq.com⟧
邮箱：⟦EMAIL|liuyang#163.com⟧（#换成@）
发到⟦EMAIL|hr@yunqi-data.com.cn⟧
我的邮箱是⟦EMAIL|chen.wei AT gmail DOT com⟧
验证码是⟦SECRET|582913⟧，请勿告诉他人
密码是⟦SECRET|Wang@1990!⟧
WiFi密码：⟦SECRET|88888888abc⟧
账号：⟦USER|zhangsan01⟧ 密码：⟦SECRET|Zs#20201⟧
登录名⟦USER|lily_chan⟧，口令⟦SECRET|p@ssw0rd99⟧
数据库连接：⟦URL|mysql://root:Qwe123456@10.0.3.15:3306/prod⟧
服务器IP：⟦IP|118.31.72.205⟧，端口22
工号⟦ACCOUNT|E20391⟧，⟦NAME|曹阳⟧
学号：⟦ACCOUNT|2019211345⟧ 姓名：⟦NAME|魏来⟧
社保号 ⟦ACCOUNT|0412345678⟧
保单号：⟦ACCOUNT|PICC2023110045678⟧
公司固话⟦PHONE|0512 6688 7799⟧转⟦PHONE|801⟧
我表哥⟦NAME|沈浩然⟧在⟦ORG|中国建筑第三工程局有限公司⟧上班
联系⟦NAME|余老师⟧：⟦PHONE|159 1234 0987⟧
⟦NAME|唐振宇⟧先生您好，您的航班已确认
尊敬的⟦NAME|潘丽⟧女士：您尾号2226的储蓄卡
致⟦NAME|董建华⟧先生
收款人：⟦NAME|崔永元⟧，账号：⟦CARD|6225688646841419⟧
微博@⟦USER|阿狸爱吃鱼_99⟧
抖音号：⟦USER|dy88xiaofang⟧
经纬度 ⟦GEO|31.230416,121.473701⟧
IMEI：⟦DEVICE|862961567386289⟧
设备序列号⟦DEVICE|F2LX9ABCN1MW⟧
MAC地址：⟦MAC|A4:5E:60:C2:11:9F⟧
邮编⟦ADDRESS|518057⟧
Hi, this is ⟦NAME|Rebecca Thornton⟧ calling about my order.
My name is ⟦NAME|Kwame Mensah⟧ and my phone number is ⟦PHONE|(617) 555-0148⟧.
Please contact ⟦NAME|Siobhan O'Reilly⟧ at ⟦EMAIL|siobhan.oreilly@example.ie⟧.
Email me: ⟦EMAIL|j.k.larsen+news@mail.example.org⟧
Reach me at ⟦EMAIL|priya [dot] nair [at] example [dot] com⟧
write to ⟦EMAIL|tom at example dot com⟧
contact ⟦EMAIL|maria_lopez(at)example.com⟧ for details
email ⟦EMAIL|john DOT doe AT example DOT co DOT uk⟧
mail: ⟦EMAIL|bob@sub.example.museum⟧;cc: ⟦EMAIL|ann@example.io⟧
<⟦EMAIL|noreply.user77@example.net⟧>
Call ⟦PHONE|+1-202-555-0173⟧ ext. 44
Tel: ⟦PHONE|+44 (0)20 7946 0123⟧
Phone: ⟦PHONE|+49 30 901820⟧
mobile ⟦PHONE|07700 900123⟧
My number's ⟦PHONE|415.555.0132⟧
Phone ⟦PHONE|+33 1 42 68 53 00⟧
WhatsApp ⟦PHONE|+55 11 91234-5678⟧
⟦PHONE|+91-98765-43210⟧ is my cell
ph: ⟦PHONE|0412 345 678⟧
call me on ⟦PHONE|(0161) 496 0123⟧
dial ⟦PHONE|1-800-555-0199⟧ and ask for ⟦NAME|Gina⟧
⟦PHONE|001 617 555 0133⟧
Fax ⟦PHONE|212-555-0187 x302⟧
my phone +⟦PHONE|12125550188⟧
tel:⟦PHONE|+34600123456⟧
Telefon: ⟦PHONE|0171/2345678⟧
number is ⟦PHONE|5550142⟧, call anytime
⟦PHONE|(03) 9876 5432⟧ after hours
⟦PHONE|+81-3-1234-5678⟧
⟦PHONE|+7 (495) 123-45-67⟧
⟦PHONE|+65 6123 4567⟧
⟦PHONE|+971 50 123 4567⟧
SSN: ⟦SSN|536-22-8714⟧
My social is ⟦SSN|536228714⟧
ssn ⟦SSN|536 22 8714⟧
Social Security Number (SSN): ⟦SSN|219-09-9999⟧
last name ⟦NAME|Okafor⟧, SSN ⟦SSN|401-55-2230⟧, DOB ⟦BIRTHDATE|04/17/1982⟧
DOB: ⟦BIRTHDATE|12-Mar-1975⟧
Date of Birth: ⟦BIRTHDATE|1990-07-23⟧
She was born on ⟦BIRTHDATE|July 4, 1991⟧ in Ohio.
born ⟦BIRTHDATE|21st of May 1968⟧
d.o.b. ⟦BIRTHDATE|3/9/58⟧
birthday is ⟦BIRTHDATE|November 12th, 1987⟧
Patient: ⟦NAME|Harold Finch⟧ MRN: ⟦ACCOUNT|00482913⟧ DOB: ⟦BIRTHDATE|02/11/1949⟧
Pt Mr. ⟦NAME|Delgado⟧ is a 67 yo male seen by Dr. ⟦NAME|Anita Rao⟧
MRN ⟦ACCOUNT|7739201⟧ admitted 03/04
Medical record # ⟦ACCOUNT|A-118-22-9⟧
Attending: ⟦NAME|Susan K. Whitfield⟧, MD
Dictated by: ⟦NAME|Paul Brenner⟧ M.D.
cc: Dr. ⟦NAME|Lindqvist⟧
Record date: 2069-04-07⏎⟦NAME|HOLLIS, MARGARET⟧⏎MRN: ⟦ACCOUNT|27840192⟧
Patient Name: ⟦NAME|Wanjiru, Grace⟧
NHS number: ⟦NATIONALID|250 188 1087⟧
NHS No ⟦NATIONALID|7684734903⟧
Health insurance ID ⟦ACCOUNT|XEH829104482⟧
Medicare number: ⟦NATIONALID|1EG4-TE5-MK73⟧
NINO ⟦NATIONALID|QQ123456C⟧ on file
CPF: ⟦NATIONALID|477.363.456-19⟧
CPF ⟦NATIONALID|98554948149⟧
DNI ⟦NATIONALID|28992766R⟧
Aadhaar no ⟦NATIONALID|215548088734⟧
PAN ⟦NATIONALID|ABCPK1234F⟧
SIN ⟦NATIONALID|046 454 286⟧
My ITIN is ⟦NATIONALID|912-70-1234⟧
EIN: ⟦NATIONALID|12-3456789⟧
VAT: ⟦NATIONALID|GB123456789⟧
Tax file number ⟦NATIONALID|123 456 782⟧
passport number is ⟦PASSPORT|C01X00T47⟧
Passport: ⟦PASSPORT|533380006⟧
US passport ⟦PASSPORT|A12345678⟧
Driver's license: ⟦LICENCE|S530-4201-7725⟧
DL# ⟦LICENCE|D08954796⟧
license no. ⟦LICENCE|MORGA753116SM9IJ⟧
Driving licence ⟦LICENCE|WDP 8842 19⟧
My card number is ⟦CARD|5424-7815-8069-9835⟧
Visa ⟦CARD|4916908091242502⟧ exp 09/26
Amex ⟦CARD|3714 397626 00071⟧
card ending, full: ⟦CARD|6011003869967842⟧
Please charge ⟦CARD|4000 0971 0020 1183⟧, cvc ⟦SECRET|812⟧
CREDIT CARD: ⟦CARD|5187316216477863⟧ PIN: ⟦SECRET|4471⟧
IBAN: ⟦IBAN|DE89 3704 0044 0532 0130 00⟧
iban ⟦IBAN|gb29nwbk60161331926819⟧
transfer to ⟦IBAN|FR14 2004 1010 0505 0001 3M02 606⟧
Account ⟦IBAN|NL91ABNA0417164300⟧ please
⟦IBAN|IT60X0542811101000000123456⟧
⟦IBAN|CH93-0076-2011-6238-5295-7⟧
Account number ⟦ACCOUNT|000123456789⟧ routing ⟦ACCOUNT|021000021⟧
Acct #: ⟦ACCOUNT|4478-2210⟧
SWIFT/BIC: ⟦ACCOUNT|DEUTDEFF500⟧
sort code ⟦ACCOUNT|20-00-00⟧ account ⟦ACCOUNT|55779911⟧
Customer ID: ⟦ACCOUNT|CUS-998213⟧
policy number ⟦ACCOUNT|HO-44-2291-0⟧
Member ID ⟦ACCOUNT|W2229081⟧
employee id ⟦ACCOUNT|EMP04432⟧
I live at ⟦ADDRESS|742 Evergreen Terrace, Springfield, IL 62704⟧.
Ship to: ⟦ADDRESS|1600 Amphitheatre Pkwy, Mountain View, CA 94043⟧
Address: ⟦ADDRESS|Flat 4, 27 Lansdowne Road, Bristol BS6 6NU⟧
my address is ⟦ADDRESS|88 Kent St Apt 5B, Brooklyn, NY 11249⟧
⟦ADDRESS|1207 N. Oakmont Blvd, Suite 300, Austin, Texas 78701⟧
⟦ADDRESS|P.O. Box 7719, Wellington 6141⟧
⟦ADDRESS|15 rue Lafayette, 75009 Paris⟧
⟦ADDRESS|Lindenallee 45, 50968 Köln⟧
⟦ADDRESS|Via Garibaldi 12, 20121 Milano⟧
She moved to ⟦ADDRESS|3119 Cedar Hollow Lane⟧ last year
billing zip ⟦ADDRESS|30309⟧
postcode ⟦ADDRESS|SW1A 1AA⟧
⟦ADDRESS|Unit 7, 110 Harbour Street, Sydney NSW 2000⟧
⟦ADDRESS|Room 1203, Tower B, 18 Queen's Road Central, Hong Kong⟧
⟦ADDRESS|No. 15, Lane 22, Section 2, Zhongshan North Road, Taipei⟧
Client IP ⟦IP|203.0.113.77⟧ blocked
2024-03-04 10:11:12 INFO login user=⟦USER|mkowalski⟧ from ⟦IP|198.51.100.23⟧:54122
Failed password for ⟦USER|jdoe77⟧ from ⟦IP|45.83.12.9⟧ port 4022 ssh2
ipv6 ⟦IP|2001:db8:85a3::8a2e:370:7334⟧
addr=[⟦IP|fe80::1ff:fe23:4567:890a⟧]
⟦IP|2a02:26f0:6c00::210:ba4b⟧ - - [10/Oct/2023:13:55:36]
MAC ⟦MAC|00-1B-44-11-3A-B7⟧
device ⟦MAC|3c:22:fb:8e:01:aa⟧ joined
hwaddr ⟦MAC|001b.4411.3ab7⟧
⟦URL|https://admin:S3cr3t!@intranet.example.com/x⟧
DATABASE_URL=⟦URL|postgres://app:hunter22@db.internal:5432/app⟧
redis: ⟦URL|redis://:p4ss@cache:6379/0⟧
⟦URL|https://user:pw123@192.0.2.5:8443/path⟧
AWS key ⟦SECRET|AKIAP6KK4RJ7SMQDWSRZ⟧
aws_secret_access_key = ⟦SECRET|EpcDoH05GM29MCkJzd8WVlnF4GwzUki5SIrNDaEu⟧
export OPENAI_API_KEY=⟦SECRET|sk-QChtoLr5MdSY1Q2Kgd3vphKs2THXJewS4umxVSgZ60kY9HXS⟧
ANTHROPIC_API_KEY: ⟦SECRET|sk-ant-api03-WKpc7grvhXQgCBFsIL6GMPRqc3gkwirfKWT4pbVixde⟧
token ⟦SECRET|ghp_jCCFFQWaS47dD61rOshQzLbKu0wTTQPKrZOX⟧
⟦SECRET|glpat-nYQiMA06cPppKFsOw1ar⟧
slack ⟦SECRET|xoxb-218827719-r4U6FhQlLgo1WawZkIlzJ0jH⟧
stripe ⟦SECRET|sk_live_r4U6FhQlLgo1WawZkIlzJ0jH⟧
key: ⟦SECRET|AIzaSyUhRANRsWlmZCtNFuISt6FdXDBYleOcGCdk9⟧
HF_TOKEN=⟦SECRET|hf_UhRANRsWlmZCtNFuISt6FdXDBYleOcGCdk9⟧
sendgrid ⟦SECRET|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⟧
twilio sid ⟦SECRET|AC53aa71b3830a13fcf93e3e3f13c90335⟧
Authorization: Bearer ⟦SECRET|eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.wTIHMB8mZakhpfR9ZX8i7z6hd8P⟧
api_key="⟦SECRET|53aa71b3830a13fcf93e3e3f13c90335⟧"
AccessKeyId: ⟦SECRET|LTAI5tY6mYut0WpFRbErlG⟧
client_secret: ⟦SECRET|Y6mYut0WpFRbErlGUAmFHKtOc3ZVLzhv⟧
X-Api-Key: ⟦SECRET|08fd8fc2244218bcf1986187d25fef061b71cae867d7⟧
password: ⟦SECRET|Tr0ub4dor&3⟧
my password is ⟦SECRET|correct-Horse7⟧
pwd=⟦SECRET|letmein2024⟧
The passcode is ⟦SECRET|773312⟧
OTP ⟦SECRET|918273⟧ expires in 5 min
Your verification code is ⟦SECRET|G-448120⟧
login: ⟦USER|raj_patel92⟧ / ⟦SECRET|Mumbai#77⟧
BTC ⟦WALLET|172Cz1kcTbLg8Ko8ywADn5eMQ6DaCQGejs⟧
send to ⟦WALLET|bc1qdtx5c44l5j6s3cmv0zkns72qqgf5l3dpxlter6⟧
ETH wallet ⟦WALLET|0xDCe4Fee2ABa384ECf0B0DbAD9fd149846d5257d7⟧
USDT TRC20: ⟦WALLET|TFajLYMprC7Dhq738Zbq4Qd1xS6PyceGH6⟧
VIN ⟦VIN|1HGB344N0DG174355⟧
vin: ⟦VIN|5YJXGCKL2J8839125⟧ 2018 Model X
IMEI ⟦DEVICE|35-147593-424312-1⟧
imei=⟦DEVICE|354951959040029⟧
serial number ⟦DEVICE|C02XK1YZJGH5⟧
License plate ⟦PLATE|7ABC123⟧ CA
plate no. ⟦PLATE|KX21 OLP⟧
username: ⟦USER|night_owl42⟧
Follow me on Twitter ⟦USER|@lena_codes⟧
IG: ⟦USER|@marco.travels⟧
my telegram is ⟦USER|@petrov_dm⟧
discord ⟦USER|shadow#4821⟧
skype: ⟦USER|live:anna.k_1⟧
⟦USER|https://www.linkedin.com/in/hannah-berg-2201⟧
Dear Mr. ⟦NAME|Abernathy⟧,
Hello ⟦NAME|Tomasz⟧, thanks for your mail.
Best regards,⏎⟦NAME|Ingrid Svensson⟧⏎⟦ORG|Northgate Logistics Ltd⟧
Sincerely,⏎⟦NAME|Chukwuemeka Obi⟧
From: ⟦NAME|Yuki Tanaka⟧ <⟦EMAIL|y.tanaka@example.jp⟧>
To: "⟦NAME|Ben Carver⟧" <⟦EMAIL|bcarver@example.com⟧>
I spoke with ⟦NAME|Jessica Ramirez⟧ yesterday about the refund.
My wife ⟦NAME|Natalya⟧ and my son ⟦NAME|Jack⟧ will attend.
⟦NAME|Michael Chen⟧ and ⟦NAME|Sarah Goldberg⟧ signed the contract.
first_name: ⟦NAME|Aurelia⟧, last_name: ⟦NAME|Montague⟧
{"firstName": "⟦NAME|Dmitri⟧", "lastName": "⟦NAME|Volkov⟧", "email": "⟦EMAIL|d.volkov@example.ru⟧"}
full name: ⟦NAME|Aaliyah Brooks⟧
Name: ⟦NAME|Jürgen Weiß⟧
Tenant ⟦NAME|Carlos Mendoza⟧ (DOB ⟦BIRTHDATE|8 Aug 1979⟧) at ⟦ADDRESS|4521 Maple Drive⟧
id,name,email,phone⏎17,⟦NAME|Olivia Park⟧,⟦EMAIL|olivia.p@example.com⟧,⟦PHONE|646-555-0119⟧
⟦NAME|Emma Wilson⟧|⟦BIRTHDATE|1984-02-29⟧|⟦PHONE|+61 2 9876 5432⟧
<name>⟦NAME|Pieter van der Berg⟧</name><phone>⟦PHONE|+31 20 123 4567⟧</phone>
I work at ⟦ORG|Brightwater Analytics LLC⟧.
The contract with ⟦ORG|Meridian Health Systems, Inc.⟧ ends in May.
⟦ORG|Kestrel & Sons GmbH⟧ sent an invoice
GPS ⟦GEO|40.712776, -74.005974⟧
Location: ⟦GEO|51.5074° N, 0.1278° W⟧
Lat ⟦GEO|48.8566⟧ Lon ⟦GEO|2.3522⟧
[⟦GEO|37.7749,-122.4194⟧] pinned
Student ID: ⟦ACCOUNT|S10293847⟧
Case No. ⟦ACCOUNT|2:21-cv-00871⟧
Medical licence number ⟦LICENCE|G45821⟧
DEA# ⟦LICENCE|BR1234563⟧
HICN ⟦ACCOUNT|123-45-6789A⟧
Beneficiary: ⟦NAME|Tunde Adeyemi⟧, acct ⟦ACCOUNT|3021998877⟧
"""

CLEAN = r"""
请问这款手机支持几个月的保修？
我的订单号是20231105889912，什么时候发货？
快递单号SF1382749201837到哪了
运单号：YT7382910384756，已签收
发票号码：04412378，金额1299.00元
请帮我写一封求职信
北京明天的天气怎么样
从上海虹桥到杭州东的G7311次列车
南京路步行街有什么好吃的
中山路和人民路交叉口堵车了
3号楼在哪里？
请打开第3章第2节
会议安排在2024年3月15日下午2点30分
截止日期：2024-12-31
周五之前把PPT发我
身份证丢了怎么补办
手机号怎么换绑
忘记密码怎么办
银行卡被吞了怎么办
密码必须包含大小写字母和数字
请输入验证码
地址填错了能改吗
高新技术企业认定标准
王者荣耀怎么上分
周杰伦是谁
李白的静夜思
黄金价格今天多少
白色连衣裙有货吗
张家界怎么玩
马上到
方便面多少钱一包
金额是3500元
马拉松42.195公里
圆周率3.1415926535
人口约14.1亿
电压220V，频率50Hz
身高175体重65
2019-2023年营收增长率为12.5%
π≈3.14159265358979
型号：XPS-15-9520
产品编码 6901234567892
ISBN 978-7-111-54742-6
条形码6921168509256
书号9787302511052
第二十条 合同自双方签字之日起生效
甲方应在收到发票后30日内付款
乙方有权解除合同
患者应多休息，多饮水
血压120/80mmHg，心率72次/分
白细胞计数 6.5×10^9/L
体温36.5℃，脉搏80次/分
主诉：头痛两天
阿司匹林100mg qd po
任何人不得擅自进入
客户满意度调查
老师好，作业什么时候交
妈妈说晚上吃饺子
我是学生，没有收入
我叫不出来他的名字
联系人一栏怎么填
姓名和电话都要写吗
负责人需要签字
同学们好
朋友推荐的
经理说可以
律师函怎么写
公司简介怎么写
有限公司和股份公司的区别
中国有多少个省
上海市政府网站
北京大学怎么样
海淀区房价多少
广东省的省会是广州
香港和澳门
台灣有哪些景點
請問營業時間？
幾點關門？
地鐵站在哪裡
我想退貨
端口号8080被占用
设置 max_tokens=2048
版本号v3.10.12
Python 3.12.1 发布了
QQ群怎么建
微信怎么加好友
微信支付失败
支付宝怎么提现
邮箱收不到验证码
出生率下降
生日快乐！
生日礼物送什么好
车牌摇号怎么申请
驾驶证过期怎么办
护照怎么办理
一二三四五六七
八月十五中秋节
二零二四年新年快乐
三七二十一
What is the capital of France?
Write a poem about autumn.
My order number is 112-9483726-1129384.
Tracking number 1Z999AA10123456784 says delivered.
Invoice INV-2023-00457 is due on 2024-02-01.
Ticket #482913 has been closed.
The meeting is at 10:30 on March 5, 2024.
Version 2.4.1.0 is out.
pip install numpy==1.26.4
The file is 1,048,576 bytes.
Pi is 3.14159265358979.
He scored 3-2, 4-1 and 6-0.
1984 is a famous novel
ISBN 978-0-306-40615-7
DOI 10.1000/182
sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
commit 3f2a9c1d8e7b6a5f4c3d2e1f0a9b8c7d6e5f4a3b
uuid 123e4567-e89b-12d3-a456-426614174000
git clone https://github.com/example/repo.git
ssh git@github.com
http://localhost:8080/index.html
ping 127.0.0.1
netmask 255.255.255.0
std::map<int, std::string>
a[1:2:3] = b[::2]
for i in range(10): print(i)
password = getpass.getpass()
assert token is not None
def login(username: str, password: str) -> bool:
api_key = os.getenv("API_KEY")
SELECT id, name, email FROM users WHERE id = 42;
The password field is required.
Forgot your password?
Reset your PIN at any branch.
How do I change my phone number?
What does SSN stand for?
My passport has expired, what now?
Which driver's license do I need?
The New York Times
Machine Learning Engineer
Best Practices for Code Review
Dear Sir or Madam,
Dear Customer Service,
To whom it may concern
Hello World
Thank you very much
Happy Birthday to you
Main Street is closed
Turn left on Fifth Avenue
Wall Street fell today
Top 10 Things To Do In Rome
12 Angry Men is a good film
3 Key Points To Remember
Room temperature is 20 degrees
Chapter 7 Section 3.2.1.4
RFC 2616 section 14.9
Boeing 737-800
Windows 11 Pro 23H2
$1,234,567.89
+5% year over year
0.1 + 0.2 = 0.30000000000000004
x^2 + y^2 = z^2
E = mc^2
GDP grew 2.1% in 2023
temperature 1e-5
1920x1080 at 60 Hz
2020, 2021, 2022 and 2023
Call me when you arrive.
I'll text you later
The patient was discharged in stable condition.
BP 120/80, HR 72, RR 16, T 98.6
Take 2 tablets every 6 hours
Hemoglobin 13.5 g/dL
The company was founded in 1998.
Apple and Microsoft reported earnings
Amazon Web Services offers EC2
Monday, Tuesday and Wednesday
Read the Docs
User Guide and API Reference
{"status": "ok", "code": 200, "items": []}
{"id": 12345, "total": 99.5, "currency": "USD"}
2024-05-06T07:08:09.123Z INFO started in 532 ms
HTTP/1.1 404 Not Found
ERROR 1045 (28000): Access denied
Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/120.0.6099.71
color: #ff00ff; margin: 0 10px
v1.2.3-beta.4+build.567
"""

# Written after the detectors were changed for what the first set had shown, and measured once before anything
# else was changed.
SECOND = r"""
客服您好，我叫⟦NAME|邹凯文⟧，昨天买的耳机左耳没声音，电话⟦PHONE|18217760043⟧
用户：麻烦改下收货地址，改成⟦ADDRESS|苏州市工业园区星湖街328号创意产业园5栋403⟧
用户：收件人改成我老公⟦NAME|蒋文韬⟧，他手机⟦PHONE|137 6455 2091⟧
亲这边核实一下，您尾号8345的手机号绑定的邮箱是⟦EMAIL|jiang_wt@outlook.com⟧吗
退款失败了，我的招行卡是⟦CARD|6225 6886 4684 1419⟧
名字⟦NAME|范晓萱⟧ 手机⟦PHONE|15021337789⟧ 地址⟦ADDRESS|武汉市江汉区解放大道688号武汉广场30楼⟧
【顺丰】您的快件已由⟦NAME|丁师傅⟧签收，电话⟦PHONE|13297001845⟧
寄件人：⟦NAME|程立军⟧/⟦PHONE|0531-88995566⟧/⟦ADDRESS|济南市历下区经十路12345号⟧
⟦NAME|秦海璐⟧ ⟦PHONE|18500012345⟧ ⟦ADDRESS|北京市通州区新华大街甲1号院6号楼2204⟧
姓名：⟦NAME|温知夏⟧ 年龄：29岁 证件号：⟦IDCARD|450102199508197338⟧
患者⟦NAME|龚德明⟧因“反复咳嗽2月”入院，床号12，病历号：⟦ACCOUNT|B2023-11802⟧
家属⟦NAME|龚小军⟧（儿子）签字，联系电话⟦PHONE|13307190022⟧
入院记录 姓名：⟦NAME|尹素珍⟧ 出生地：湖南 职业：退休 出生日期：⟦BIRTHDATE|1948年11月03日⟧
检验者：⟦NAME|樊丽⟧ 审核者：⟦NAME|倪娜⟧
体检号⟦ACCOUNT|TJ20231188⟧，⟦NAME|施展⟧，男
医生⟦NAME|骆红梅⟧建议复查
应聘人：⟦NAME|殷子涵⟧，现居⟦ADDRESS|南京市鼓楼区汉口路22号⟧，⟦EMAIL|yzh.1997@gmail.com⟧
联系方式：⟦PHONE|(+86)15951880123⟧ 微信：⟦USER|yin_zihan97⟧
出借人：⟦NAME|俞国华⟧（身份证号码：⟦IDCARD|330106197804208803⟧）
借款人⟦NAME|章玉梅⟧向⟦NAME|俞国华⟧借款五万元整
丙方（保证人）：⟦NAME|施明远⟧，住址：⟦ADDRESS|宁波市鄞州区中山东路1999弄7号⟧
买方：⟦ORG|青岛海纳食品有限公司⟧ 地址：⟦ADDRESS|青岛市市北区辽阳西路100号⟧
账户名称：⟦ORG|厦门鹭江物流有限公司⟧，账号：⟦ACCOUNT|35050161553800000123⟧
统一信用代码：⟦COMPANYID|9135020047065K322B⟧
询问笔录：被询问人⟦NAME|柳青山⟧，曾用名⟦NAME|柳大山⟧，户籍所在地⟦ADDRESS|贵州省遵义市红花岗区忠庄镇幸福村7组⟧
经查，⟦NAME|童某⟧使用的手机号码为⟦PHONE|17358820911⟧，微信号⟦USER|tong_168168⟧
被告人⟦NAME|祝家辉⟧，⟦BIRTHDATE|1986年1月9日⟧出生于浙江省
一辆牌号为⟦PLATE|鲁B·5T0R8⟧的白色轿车
⟦PLATE|皖AD83721⟧请速挪车，电话⟦PHONE|18956012233⟧
新能源车牌 ⟦PLATE|渝A F67890⟧
群里@⟦NAME|谭晓⟧ 你的工资卡⟦CARD|6217036441855345789⟧对吗
12栋1单元⟦NAME|贺阿姨⟧家漏水，她电话⟦PHONE|13980012277⟧
团购：⟦NAME|侯雪⟧，3份，⟦PHONE|15882001133⟧，⟦ADDRESS|金科城2期8栋1单元902⟧
序号	姓名	手机⏎1	⟦NAME|于洋⟧	⟦PHONE|13601234567⟧⏎2	⟦NAME|白雪⟧	⟦PHONE|13701234568⟧
⟦NAME|毛宁⟧,女,⟦IDCARD|371002201010153114⟧,⟦PHONE|18600011122⟧
{"userName":"⟦USER|xiaomao2020⟧","phone":"⟦PHONE|13899001122⟧","address":"⟦ADDRESS|沈阳市和平区南京南街88号⟧"}
{"客户姓名":"⟦NAME|戴志强⟧","手机号":⟦PHONE|13512340099⟧}
⟦ADDRESS|香港銅鑼灣軒尼詩道500號希慎廣場20樓2003室⟧
⟦ADDRESS|新界沙田石門安群街3號京瑞廣場一期15樓⟧
聯絡人：⟦NAME|黃嘉敏⟧ 電話：⟦PHONE|2345 6789⟧
⟦ADDRESS|台中市西屯區台灣大道三段99號⟧
⟦ADDRESS|桃園市中壢區中大路300號⟧ ⟦NAME|吳建宏⟧收
連絡電話 ⟦PHONE|0987654321⟧
統一編號：⟦COMPANYID|12345675⟧
身分證 ⟦IDCARD|H170204347⟧
香港身份證號碼：⟦IDCARD|R384517(5)⟧
護照號碼⟦PASSPORT|K12345678⟧
澳门居民身份证 ⟦IDCARD|1234567(8)⟧
台胞证⟦PASSPORT|12345678⟧
我的扣扣⟦USER|765432109⟧
扣扣号：⟦USER|1098765432⟧
➕v：⟦USER|abc_2233⟧
邮箱⟦EMAIL|wu.lei艾特163点com⟧
Email：⟦EMAIL|test_user@vip.qq.com⟧，欢迎来信
固定电话：⟦PHONE|0431—85166666⟧
手机：⟦PHONE|138．0013．8000⟧
tel ⟦PHONE|（0755）8888 6666⟧
⟦PHONE|138-0571-2233⟧是我新号码
我生日是⟦BIRTHDATE|95年3月12日⟧
⟦BIRTHDATE|1988.08.08⟧生，属龙
农历⟦BIRTHDATE|八月十五⟧生日
房卡密码 ⟦SECRET|0821#⟧
门锁密码是⟦SECRET|135790⟧
支付密码：⟦SECRET|246810⟧
管理员账号 ⟦USER|admin_lz⟧，密码 ⟦SECRET|Lz@2024#dev⟧
token=⟦SECRET|ou9OWP2MKuikCuAlxS6rfv12⟧
内网地址⟦IP|172.16.8.99⟧不通
我在⟦ORG|成都天府软件园有限公司⟧做测试
驾照号⟦LICENCE|420111199912124078⟧
营业执照号 ⟦COMPANYID|12320500N1RB6C849L⟧
设备IMEI号⟦DEVICE|019733212104561⟧
工牌号：⟦ACCOUNT|GH00812⟧
医保号⟦ACCOUNT|3301020045⟧
Hello, my name is ⟦NAME|Nkechi Balogun⟧ and I need help with my account.
You can text me at ⟦PHONE|312.555.0176⟧ after 5.
My email address is ⟦EMAIL|wren_h@example.co.uk⟧ and my dob is ⟦BIRTHDATE|1979/10/02⟧.
I'm ⟦NAME|Ravi Subramanian⟧, calling from ⟦PHONE|+91 80 4123 4567⟧.
Agent: May I have your full name?⏎Customer: ⟦NAME|Lucia Fernandez⟧
Customer: it's ⟦EMAIL|lucia (dot) f (at) example (dot) net⟧
Sure, it is ⟦CARD|4988-0727-6816-0100⟧ expiring 11/27 with security code ⟦SECRET|905⟧.
Could you send it to ⟦ADDRESS|5210 Willow Creek Dr, Plano, TX 75093⟧?
We moved to ⟦ADDRESS|19 Rosemary Close, Leeds LS8 2QT⟧ in May.
mail it to ⟦ADDRESS|PO Box 882, Boise, ID 83701⟧
⟦ADDRESS|400 S Hope St, Los Angeles, CA⟧
Office: ⟦ADDRESS|Level 9, 155 Queen Street, Auckland 1010⟧
⟦ADDRESS|Flat 12B, Tower 3, 88 Nathan Road, Kowloon⟧
⟦ADDRESS|Rua Augusta 1508, São Paulo⟧
⟦ADDRESS|Keizersgracht 174, 1016 DW Amsterdam⟧
⟦ADDRESS|Calle de Alcalá 45, 28014 Madrid⟧
Patient ⟦NAME|Eleanor Voss⟧, DOB ⟦BIRTHDATE|09/30/1951⟧, MRN# ⟦ACCOUNT|5508123⟧
This 54-year-old woman was referred by Dr. ⟦NAME|Okonkwo⟧ on 5/2.
Provider: ⟦NAME|James T. Holloway⟧, DO
⟦NAME|PEMBERTON, ALICE R⟧⏎DOB: ⟦BIRTHDATE|1938-05-17⟧
Discharge summary electronically signed by: ⟦NAME|Marta Kowalczyk⟧ MD
Next of kin: ⟦NAME|Rosa Jimenez⟧ (daughter) ⟦PHONE|(305) 555-0144⟧
Insurance: Aetna, member ID ⟦ACCOUNT|W88210047⟧
Pager ⟦PHONE|555-0199⟧
SSN is ⟦SSN|078-05-1120⟧
soc sec # ⟦SSN|412 67 3390⟧
Taxpayer ID ⟦NATIONALID|98-7654321⟧
CPF nº ⟦NATIONALID|985.549.481-49⟧
NIE ⟦NATIONALID|X1234567L⟧
Personal number ⟦NATIONALID|850709-9805⟧
BSN: ⟦NATIONALID|111222333⟧
Aadhaar: ⟦NATIONALID|5299 7834 2105⟧
NI no: ⟦NATIONALID|JG 10 37 59 A⟧
Passport no ⟦PASSPORT|L8982104⟧ issued in Oslo
my passport (⟦PASSPORT|XD4471920⟧) expires soon
Driver license ⟦LICENCE|T168-4023-2291⟧ state MI
DL: ⟦LICENCE|Y7734219⟧
Card: ⟦CARD|2223899614157909⟧
Diners ⟦CARD|3056 225039 9899⟧
IBAN ⟦IBAN|AT61 1904 3002 3457 3201⟧ BIC ⟦ACCOUNT|BKAUATWW⟧
pay ⟦IBAN|PT50000201231234567890154⟧ by Friday
⟦IBAN|SE45 5000 0000 0583 9825 7466⟧
checking account ⟦ACCOUNT|1100223344⟧, routing number ⟦ACCOUNT|122105155⟧
Loan number: ⟦ACCOUNT|LN-2231-0098⟧
Reservation under ⟦NAME|Thompson⟧, confirmation ⟦ACCOUNT|XK4P2Q⟧
frequent flyer ⟦ACCOUNT|BA40221998⟧
User ⟦USER|k.ivanova⟧ logged in from ⟦IP|91.198.174.192⟧
sshd[812]: Accepted publickey for ⟦USER|deploy7⟧ from ⟦IP|10.20.30.40⟧ port 55122
remote_addr: ⟦IP|2001:0db8:0000:0000:0000:ff00:0042:8329⟧
src=⟦IP|192.168.44.7⟧ dst=⟦IP|8.8.4.4⟧
Device MAC ⟦MAC|F0:9F:C2:33:81:0D⟧, hostname lab3
git remote add o ⟦URL|https://jdoe:ghtok123@git.example.com/a/b.git⟧
amqp url ⟦URL|amqp://guest:rabbit77@10.1.2.3:5672/vh⟧
GITHUB_TOKEN=⟦SECRET|github_pat_11ABCDEFG0Y6mYut0WpFRbErlGUAmFHKtOc3ZVLzhv⟧
"secretKey": "⟦SECRET|wTIHMB8mZakhpfR9ZX8i7z6hd8P⟧"
AZURE_CLIENT_SECRET=⟦SECRET|Q8x8Q~SRdakcfJebJNzXhi8XO1J80xC5UpqO⟧
MONGO_PASSWORD: ⟦SECRET|xT9!mango⟧
passwd ⟦SECRET|Summer2023!⟧
The Wi-Fi password is ⟦SECRET|blueSky_42⟧
telegram bot ⟦SECRET|412345678:AAHdqTcvCH1vGWJxfSeofSAs0K5PALDsaw⟧
npm token ⟦SECRET|npm_jCCFFQWaS47dD61rOshQzLbKu0wTTQPKrZOX⟧
x-auth-token: ⟦SECRET|515c5d368d565a03f0ab4e9df161652e9639911b⟧
one-time code ⟦SECRET|55 21 09⟧
DOGE ⟦WALLET|DAj2kjgMutWvAY8igb5da5XSY1yzVdeYyc⟧
wallet: ⟦WALLET|3GdME4uZrgSH84kdXztxRAfgAHSJ1kY5AZ⟧
VIN: ⟦VIN|JTDA9HPDX84884776⟧, plate ⟦PLATE|8XYZ456⟧
registration ⟦PLATE|LB71 KFX⟧
S/N ⟦DEVICE|R58M31ABCDE⟧
add me on snap: ⟦USER|jess.k99⟧
my insta is ⟦USER|@kai_surfs⟧
GitHub: ⟦USER|octo-fan22⟧
Hi ⟦NAME|Beatrix⟧,⏎Please find attached.
Thanks,⏎⟦NAME|Owen⟧
Kind regards,⏎Dr. ⟦NAME|Amara Nwosu⟧
From: ⟦NAME|Lars Mikkelsen⟧ <⟦EMAIL|lars@example.dk⟧>
Cc: ⟦NAME|Fatou Diop⟧ <⟦EMAIL|fd@example.sn⟧>; ⟦NAME|Ken Ito⟧ <⟦EMAIL|ki@example.jp⟧>
My brother ⟦NAME|Anders⟧ lives with us.
The suspect, ⟦NAME|Darnell Hughes⟧, was seen nearby.
⟦NAME|Katarzyna Nowak⟧ called to cancel her subscription.
Meeting with ⟦NAME|Henrik Lund⟧ and ⟦NAME|Anna Petrova⟧ at noon
{"customer": {"name": "⟦NAME|Isolde Kerr⟧", "tel": "⟦PHONE|+353 1 234 5678⟧"}}
name=⟦NAME|Malik Osei⟧&email=⟦EMAIL|m.osei@example.com⟧
<lastName>⟦NAME|Grünwald⟧</lastName>
Employee: ⟦NAME|Bronwyn Pugh⟧, badge number ⟦ACCOUNT|77120⟧
3,⟦NAME|Harriet Nash⟧,⟦PHONE|0161 496 0345⟧,⟦EMAIL|hn@example.org⟧
⟦NAME|Soo-jin Park⟧;⟦EMAIL|sjp@example.kr⟧;⟦PHONE|+82 10-1234-5678⟧
We signed with ⟦ORG|Halcyon Freight Pty Ltd⟧ last week.
coordinates ⟦GEO|-33.8688, 151.2093⟧
lat=⟦GEO|52.5200⟧&lng=⟦GEO|13.4050⟧
Case number ⟦ACCOUNT|CR-2020-04417⟧
phone number: ⟦PHONE|+234 803 123 4567⟧
Mobile: ⟦PHONE|+62 812-3456-7890⟧
T: ⟦PHONE|020 7946 0991⟧ M: ⟦PHONE|07700 900456⟧
ring ⟦PHONE|0044 20 7946 0958⟧
(Home) ⟦PHONE|718-555-0163⟧ (Work) ⟦PHONE|718-555-0170 ext 12⟧
"""

SECOND_CLEAN = r"""
我想查一下我的快递什么时候到
单号 773182930412345 一直没有物流信息
您的工单2024031500871已受理
这款洗衣机功率2200W，容量10公斤
第五届中国国际进口博览会
高考志愿怎么填
向老师请教问题
语文老师布置了作业
基金经理怎么选
方经理不在吗还是应经理
找到了吗
@所有人 明天放假
找工作太难了
找时间聊聊
乙方应当按时付款
甲方有权单方面解除
医师资格考试什么时候报名
家属可以陪护吗
老板说下周涨工资
领导安排的任务
邻居太吵了怎么办
叔叔阿姨好
我找不到订单
请找管理员
护士站在三楼
秘书处的通知
校长发言稿怎么写
请在2号窗口办理
共3层楼，每层5户
地铁2号线从浦东机场到徐泾东
台湾的首都在哪
國慶日放假嗎
請問這個多少錢
價格是1200元
民国八年五四运动
1995年3月上映的电影
出生在农村的作家
列车D2281次，08车12A号
航班MU5101准点
房间面积89.5平方米
比分是21:18
数学题：123456789×987654321
温度区间-20到50摄氏度
微信小程序怎么开发
加我好友吧
加微信群
QQ音乐会员
密码锁怎么换电池
token是什么意思
Please confirm the delivery of order #88213-2291.
Reference: PO-2023-7781, qty 200
See figure 3.2 in chapter 12.
The rate is 4.25% for 30 years.
Contact Customer Support at any time.
Call Center hours are 9-5.
Contact Technical Support via chat.
Meet at noon on Friday.
Ask for Help Desk
This is Spring Boot.
From: Monday To: Friday
Best regards,
Name: required
Client: Chrome on Windows
Author: unknown
@Override public void run() {}
import { x } from '@scope/pkg_name'
@pytest.fixture
@app.route("/user_list")
at the dot com boom
look at this dot
The ratio was 0.4512, 0.5488
points (12.3456, 45.6789), (1.2345, 2.3456)
[0.1234, -0.5678, 0.9012]
1.2345, -2.3456
user = get_user(id)
user: null
login failed
social media is down
line 42 of main.py
signal 11 received
handle errors gracefully
No. 5 in the charts
No. 1 Best Seller, Amazon
Lane 3, Gate 12
Tower Bridge is in London
Section 4, Paragraph 2
Block 12 of the chain
12 months, 30 days
100,000 users
1,234,567 downloads
2,048,000 and 4,096,000
10,000,000.50
12345,67890
x=1234567,y=89
ABC, DEF
TODO, FIXME
README, LICENSE
SELECT, INSERT
"""
